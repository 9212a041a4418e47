"""Takes the nats of single bytes from an evaluation: to a .npy file, or of the first bytes alone."""

from __future__ import annotations

import numpy as np
from etils import epath

from megabyte_jax.data.sources import Source
from megabyte_jax.data.subwords.source import tokens_within
from megabyte_jax.models.loss import bits_per_byte


class PerByte:
  """Writes each byte's nats, float32, to a .npy file; bytes that are not scored stay NaN.

  Args:
    path: of the file, as yet.
    lengths: bytes of each document.
  """

  def __init__(self, path: epath.Path, lengths: np.ndarray):
    self.first = np.concatenate([[0], np.cumsum(lengths)])
    count = int(self.first[-1])
    nothing = np.full(min(count, 1 << 20), np.nan, np.float32)  # as --max-bytes leaves it
    with open(path, "wb") as file:  # a full disk is told here; writing to memory-mapped holes it would kill the process
      np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
      for start in range(0, count, len(nothing)):
        file.write(nothing[: count - start].data)
    self.nats = np.load(path, mmap_mode="r+")

  def put(self, document: int, start: int, nats: np.ndarray, weights: np.ndarray) -> None:
    """Keeps the nats of a window where it scores; `evaluate` calls it as `on_byte_nats`."""
    at, mask = int(self.first[document]) + start, weights > 0
    self.nats[at : at + len(nats)][mask] = nats[mask]


class FirstBytes:
  """Sums the nats of a source's first bytes in an evaluation of all: what one with `max_bytes` would score.

  Windows lie at fixed places of a document and predictions see no later byte, so that the sums are the same.

  Args:
    source: the documents.
    count: how many bytes; 0 takes all.
  """

  def __init__(self, source: Source, count: int = 0):
    self._left = tokens_within(source, count)  # of each document
    self._nats, self._bytes = 0.0, 0

  def put(self, document: int, start: int, nats: np.ndarray, weights: np.ndarray) -> None:
    """Adds the nats of a window where it scores; `evaluate` calls it as `on_byte_nats`."""
    within = weights[: max(0, int(self._left[document]) - start)]
    self._nats += float(nats[: len(within)][within > 0].sum(dtype=np.float64))
    self._bytes += int(within.sum())

  @property
  def bpb(self) -> float:
    """Bits per byte of them."""
    return bits_per_byte(self._nats, self._bytes)
