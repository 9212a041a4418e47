"""Orders the training data of recurrent models: row b of step s + 1 goes on where row b of step s ended.

The documents of an epoch, in an order drawn from (seed, epoch), are cut into segments one after the other; the last one
of a document may be short. The list of all segments is divided into equal runs, one for each row of a batch, and a step
takes the next segment of every run. What a row holds is therefore index arithmetic, as for other models (batches.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megabyte_jax.data.sources import Mixture, Source, check_unit, subject
from megabyte_jax.errors import ConfigError, DataError


class Segment(NamedTuple):
  """The place of a segment.

  Attributes:
    document: its number.
    start, length: the document's bytes [start, start + length).
    fresh: True where the row has read nothing before it: the document, or the row's run of the epoch, begins.
  """

  document: int
  start: int
  length: int
  fresh: bool


class ConsecutiveSegments:
  """The segments that each of `rows` rows reads from one source, step after step.

  An epoch has as many steps as a run has segments, and leaves out fewer segments than there are rows, others in every
  epoch.

  Args:
    source: where the bytes are; documents are never joined.
    context: bytes per segment.
    seed: 0 <= seed < 2^32.
    rows: of a batch.

  Raises:
    ConfigError: the context is not a multiple of the source's unit.
    DataError: there are fewer segments than rows.
  """

  def __init__(self, source: Source, context: int, seed: int, rows: int):
    self.source, self.context, self.seed, self.rows, self.slow = source, context, seed, rows, source.slow
    check_unit(source, context)
    self._counts = -(-np.asarray(source.lengths, np.int64) // context)
    self.segments = int(self._counts.sum())
    if self.segments < rows:
      raise DataError(
        f"{subject(source)} {self.segments:,} {'segment' if self.segments == 1 else 'segments'} of {context:,} bytes, "
        f"fewer than the {rows} rows of a batch; give more data, or a smaller batch_size or context"
      )
    self.steps_per_epoch = self.segments // rows
    self._order = functools.lru_cache(maxsize=2)(self._draw_order)  # of the epochs at hand

  def _draw_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an epoch's documents in order, and the number of segments up to the end of each."""
    documents = np.random.default_rng((self.seed, epoch)).permutation(len(self._counts))
    return documents, np.cumsum(self._counts[documents])

  def segment_of(self, step: int, row: int) -> Segment:
    """Returns the segment that row `row` reads in step `step`."""
    epoch, i = divmod(step, self.steps_per_epoch)
    documents, ends = self._order(epoch)
    number = row * self.segments // self.rows + i
    place = int(ends.searchsorted(number, side="right"))
    document = int(documents[place])
    within = number - int(ends[place] - self._counts[document])
    start = within * self.context
    length = min(self.context, int(self.source.lengths[document]) - start)
    return Segment(document, start, length, within == 0 or i == 0)

  def read(self, draw: int, out_T: np.ndarray) -> int:
    """Writes the bytes of row `draw` % rows of step `draw` // rows to the front of `out_T`; returns their number."""
    document, start, length, _ = self.segment_of(*divmod(draw, self.rows))
    out_T[:length] = self.source.read(document, start, start + length)
    return length

  def is_fresh(self, draw: int) -> bool:
    """Returns True where the row's memory has to be empty; `draw` as in `read`."""
    return self.segment_of(*divmod(draw, self.rows)).fresh


class MixedSegments:
  """Rows of several sources, shared out in the proportions of their weights, to the nearest row.

  Raises:
    ConfigError: a source would get no row.
  """

  def __init__(
    self, sources: Sequence[Source], weights: Sequence[float], context: int, seeds: Sequence[int], rows: int
  ):
    shares = shared_out(rows, weights)
    if 0 in shares:
      raise ConfigError(
        f"config.data.train_weights {tuple(weights)} leave a source without a row, for each row of a batch reads one "
        f"source; batch_size is {rows}, make it larger"
      )
    of_sources = zip(sources, seeds, shares, strict=True)
    self.parts = [ConsecutiveSegments(source, context, seed, share) for source, seed, share in of_sources]
    self.context, self.rows, self.slow = context, rows, any(part.slow for part in self.parts)
    self._part_of_row = np.repeat(np.arange(len(shares)), shares)
    self._first_row = np.cumsum([0, *shares[:-1]])

  def _draw_of_part(self, draw: int) -> tuple[ConsecutiveSegments, int]:
    step, row = divmod(draw, self.rows)
    k = int(self._part_of_row[row])
    return self.parts[k], step * self.parts[k].rows + row - int(self._first_row[k])

  def read(self, draw: int, out_T: np.ndarray) -> int:
    """Writes a row's bytes; see `ConsecutiveSegments.read`."""
    part, draw_of_part = self._draw_of_part(draw)
    return part.read(draw_of_part, out_T)

  def is_fresh(self, draw: int) -> bool:
    """Returns True where the row's memory has to be empty; see `ConsecutiveSegments.is_fresh`."""
    part, draw_of_part = self._draw_of_part(draw)
    return part.is_fresh(draw_of_part)


def shared_out(rows: int, weights: Sequence[float]) -> list[int]:
  """Returns whole numbers of rows in the proportions of `weights`, by the largest remainders."""
  exact = rows * np.asarray(weights) / np.sum(weights)
  shares = np.floor(exact).astype(int)
  for k in np.argsort(shares - exact, kind="stable")[: rows - shares.sum()]:
    shares[k] += 1
  return shares.tolist()


def open_segments(source: Source, *, context: int, seed: int, rows: int) -> ConsecutiveSegments | MixedSegments:
  """Opens the segments of a source for batches of `rows` rows; those of a `Mixture` in its proportions."""
  if not isinstance(source, Mixture):
    return ConsecutiveSegments(source, context, int(np.random.SeedSequence(seed).generate_state(1)[0]), rows)
  seeds = np.random.SeedSequence(seed).generate_state(len(source.sources))
  return MixedSegments(source.sources, source.weights, context, [int(s) for s in seeds], rows)
