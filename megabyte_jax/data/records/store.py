"""Says what a store of records offers, and makes texts of the records a source of documents."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.media.encoded_media import EncodedMedia
from megabyte_jax.data.shared_cache import SharedCache, array_bytes
from megabyte_jax.data.sources import check_range
from megabyte_jax.errors import DataError

_TEXT_BYTES = 1 << 28  # of texts kept at hand: an evaluation reads the windows of a book one after the other


class RecordStore(EncodedMedia, Protocol):
  """One field of many records with random access: texts, or encoded images or recordings.

  Attributes:
    slow: whether reading takes work that threads can share, or waiting.
  """

  slow: bool

  @property
  def sizes(self) -> np.ndarray:
    """int64 [records], bytes of each value, none of which is empty; for text alone."""
    ...


class RecordTexts:
  """The source of a store's texts: one document per record."""

  joinable, unit = True, 1

  def __init__(self, store: RecordStore):
    self._store = store
    self.lengths, self.slow, self.skipped = store.sizes, store.slow, store.skipped
    self.skipped_names = list[str]()  # of files
    self._text = SharedCache(self._load, _TEXT_BYTES, array_bytes)

  @property
  def names(self) -> Sequence[str]:
    """One name per record, made when it is asked for."""
    return self._store.names

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the records, and with how many were left out."""
    return combine_fingerprints([self._store.fingerprint, str(self.skipped)])

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Reads bytes; see `Source`. Raises DataError naming a record that is not what it was when the data were opened."""
    check_range(self, document, start, stop)
    return self._text(document)[start:stop].copy()

  def _load(self, i: int) -> np.ndarray:
    text = self._store.load(i)
    if len(text) != self.lengths[i]:
      raise DataError(f"{self._store.place(i)} has changed since the data were opened; start again")
    return np.frombuffer(text, np.uint8)


class Numbered(Sequence[str]):
  """NAME[0], NAME[1], ... of several parts, each with its own NAME, without a list of millions of strings.

  Args:
    parts: names of the parts.
    counts: records of each.
  """

  def __init__(self, parts: Sequence[str], counts: Sequence[int]):
    self._parts, self._ends = list(parts), np.cumsum(np.asarray(counts, np.int64))

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, i):
    if isinstance(i, slice):
      return [self[j] for j in range(*i.indices(len(self)))]
    i = int(i) + (len(self) if i < 0 else 0)
    if not 0 <= i < len(self):
      raise IndexError(i)
    part, number = self.find(i)
    return f"{self._parts[part]}[{number}]"

  def find(self, i: int) -> tuple[int, int]:
    """Returns (part, number within the part) of record i."""
    part = int(np.searchsorted(self._ends, i, side="right"))
    return part, i - (int(self._ends[part - 1]) if part else 0)


class Chosen(Sequence[str]):
  """Some of a sequence's names."""

  def __init__(self, names: Sequence[str], chosen: np.ndarray):
    self._all, self._chosen = names, chosen

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, i):
    if isinstance(i, slice):
      return [self._all[int(j)] for j in self._chosen[i]]
    return self._all[int(self._chosen[i])]
