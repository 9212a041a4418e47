"""Makes training batches whose order is a pure function of (seed, step).

Which bytes a row of a batch holds is index arithmetic: row r of step s is draw number s * batch_size + r; draws walk
through shuffled epochs of windows. So starting at any step costs nothing, and any number of hosts sees the same global
batches, each host reading only the rows that its own devices hold.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from grain.experimental import index_shuffle

from megabyte_jax.config.model import check_bytes, latent_stride, token_dtype
from megabyte_jax.data.consecutive_segments import ConsecutiveSegments, MixedSegments, open_segments
from megabyte_jax.data.read_ahead import THREADS
from megabyte_jax.data.sources import Mixture, Source, check_unit, subject
from megabyte_jax.errors import DataError, require

_AHEAD = 2  # batches on their way to the devices while the current one is worked on


class Batch(NamedTuple):
  """Bytes and how many of each row are data; the rest of a row, past its length, is zeros to be left unscored.

  Attributes:
    x_BT: uint8 [batch, context]; of subwords uint16 or uint32.
    length_B: int32 [batch], 1 <= length <= context; always the context where windows are packed.
    fresh_B: bool [batch], True where a row does not go on from the batch before; None where rows never do.
  """

  x_BT: np.ndarray | jax.Array
  length_B: np.ndarray | jax.Array
  fresh_B: np.ndarray | jax.Array | None = None


class Place(NamedTuple):
  """The place of a window: `length` bytes from byte `start` of a document on, in the next documents too if need be."""

  document: int
  start: int
  length: int


class Windows:
  """All training windows of one source: what draw number n is.

  packed: the documents, joined end to end, are cut into windows of `context` bytes from an offset that is drawn
    anew for each epoch; an epoch leaves out fewer than two windows' worth of bytes, at the two ends.
  whole: each document is cut from its first byte on and its last window may be short; every epoch has every byte once.

  With `latents` only the last so many bytes of a window are predicted (PerceiverAR). Windows then end every
  latents / 2 bytes and overlap; those of a whole document begin with the latents alone and grow to `context`, as they
  do in evaluation (evaluation/windows.py), so that an epoch predicts every byte about twice.

  Args:
    source: where the bytes are; one that is not joinable is always cut whole.
    context: bytes per window.
    seed: 0 <= seed < 2^32.
    documents: packed | whole.
    latents: bytes at the end of a window that are predicted; 0 predicts all.

  Raises:
    ConfigError: the context, or half the latents, is not a multiple of the source's unit.
    DataError: packed data hold fewer bytes than one window.
  """

  def __init__(self, source: Source, context: int, seed: int, documents: str, latents: int = 0):
    self.source, self.context, self.seed, self.slow = source, context, seed, source.slow
    self.packed = documents == "packed" and source.joinable
    self.total = int(source.lengths.sum())
    self._first_end = latents or context  # bytes of the first window of a document
    self._stride = latent_stride(latents) if latents else context
    check_unit(source, context)
    require(
      self._stride % source.unit == 0,
      f"{latents} latents, which move by half, cut apart the {source.unit} bytes of a sample; make the half a multiple",
    )
    if self.packed:
      if self.total < context:
        raise DataError(
          f"{subject(source)} {self.total:,} bytes, fewer than the context of {context:,}; give more data, a shorter "
          "context, or --config.data.documents=whole, which pads short documents"
        )
      self._ends = np.cumsum(source.lengths)
      self.per_epoch = max(1, (self.total - context) // self._stride)
    else:
      more = -(-np.maximum(source.lengths - self._first_end, 0) // self._stride)
      self._ends = np.cumsum(np.where(source.lengths > 0, 1 + more, 0))
      self.per_epoch = int(self._ends[-1])

  def place_of(self, draw: int) -> Place:
    """Returns the window that is draw number `draw` >= 0."""
    epoch, window = divmod(draw, self.per_epoch)
    if self.per_epoch > 1:  # as grain.MapDataset.range(per_epoch).shuffle(seed).repeat() has it, in a tenth of the time
      seed = (self.seed + epoch) % 2**32
      window = index_shuffle(window, max_index=self.per_epoch - 1, seed=seed, rounds=4)
    if self.packed:
      unit = self.source.unit
      slack = (self.total - self.context - (self.per_epoch - 1) * self._stride) // unit
      place = window * self._stride + unit * _random_below(slack + 1, self.seed, epoch)
      document = int(self._ends.searchsorted(place, side="right"))
      return Place(document, place - self._first(document), self.context)
    document = int(self._ends.searchsorted(window, side="right"))
    end = self._first_end + (window - self._first(document)) * self._stride
    start = max(0, end - self.context)
    return Place(document, start, min(end, int(self.source.lengths[document])) - start)

  def read(self, draw: int, out_T: np.ndarray) -> int:
    """Writes the bytes of draw number `draw` to the front of `out_T` and returns how many there are."""
    document, start, length = self.place_of(draw)
    done = 0
    while done < length:
      stop = min(start + length - done, int(self.source.lengths[document]))
      out_T[done : done + stop - start] = self.source.read(document, start, stop)
      done, document, start = done + stop - start, document + 1, 0
    return length

  def _first(self, document: int) -> int:
    return int(self._ends[document - 1]) if document else 0


class MixedWindows:
  """Draws from several `Windows` in fixed proportions, evenly interleaved."""

  def __init__(self, parts: Sequence[Windows], weights: Sequence[float]):
    self.parts, self.context, self.slow = parts, parts[0].context, any(part.slow for part in parts)
    endless = [grain.MapDataset.range(1).repeat().map_with_index(lambda i, _, k=k: (k, i)) for k in range(len(parts))]
    self._order = grain.MapDataset.mix(endless, weights)

  def read(self, draw: int, out_T: np.ndarray) -> int:
    """Writes a draw's bytes; see `Windows.read`."""
    part, draw_of_part = self._order[draw]
    return self.parts[part].read(draw_of_part, out_T)


AnyWindows = Windows | MixedWindows | ConsecutiveSegments | MixedSegments


def open_windows(
  source: Source, *, context: int, seed: int, documents: str = "packed", latents: int = 0, consecutive_rows: int = 0
) -> AnyWindows:
  """Opens the windows of a source; those of a `Mixture` are shuffled each on its own and drawn in its proportions.

  With `consecutive_rows`, the rows of a batch, they are segments of whole documents: see consecutive_segments.py.
  """
  if consecutive_rows:
    return open_segments(source, context=context, seed=seed, rows=consecutive_rows)
  parts = source.sources if isinstance(source, Mixture) else [source]
  seeds = np.random.SeedSequence(seed).generate_state(len(parts))
  windows = [Windows(part, context, int(s), documents, latents) for part, s in zip(parts, seeds, strict=True)]
  return MixedWindows(windows, source.weights) if isinstance(source, Mixture) else windows[0]


def batches(
  source: Source,
  *,
  batch_size: int,
  context: int,
  seed: int,
  documents: str = "packed",
  latents: int = 0,
  **options: Any,
) -> Iterator[tuple[int, Batch]]:
  """Opens the windows of a source and yields (step, batch) of them.

  Args:
    source: what to read.
    batch_size: rows over all devices of all hosts.
    context: bytes per row.
    seed: of the order; the same (seed, step) always gives the same batch.
    documents, latents: see `Windows`.
    options: further arguments of `draw_batches`.

  Raises:
    DataError, ConfigError: see `Windows` and `draw_batches`.
  """
  windows = open_windows(source, context=context, seed=seed, documents=documents, latents=latents)
  return draw_batches(windows, batch_size=batch_size, **options)


def draw_batches(
  windows: AnyWindows,
  *,
  batch_size: int,
  first_step: int = 0,
  num_steps: int | None = None,
  vocab_size: int = 256,
  sharding: jax.sharding.Sharding | None = None,
  num_threads: int | None = None,
) -> Iterator[tuple[int, Batch]]:
  """Yields (step, batch) for the steps from `first_step` on.

  Args:
    windows: what `open_windows` returns.
    batch_size: rows over all devices of all hosts.
    first_step: where to start or resume; costs nothing.
    num_steps: stop before this step; None never stops.
    vocab_size: of the model, which knows no other bytes.
    sharding: of the [batch, context] array. Batches are then global arrays, of which this process reads only the rows
      that its devices hold, and they are sent to the devices ahead of time. None yields NumPy arrays of all rows.
    num_threads: threads that read and decode; None takes one per core, at most 16, or a single one where reading is
      cheap and threads would only wait for each other; 0 reads when asked.

  Raises:
    DataError: when reached, an item that cannot be read.
    ConfigError: when reached, a byte that the model does not know.
  """
  context = windows.context
  rows = np.arange(batch_size) if sharding is None else rows_of_this_process(sharding, batch_size, context)
  threads = num_threads if num_threads is not None else THREADS if windows.slow else 1
  host = host_batches(windows, batch_size, rows, first_step, num_steps, context, threads, vocab_size)
  return host if sharding is None else _to_devices(host, rows, batch_size, sharding)


def rows_of_this_process(sharding: jax.sharding.Sharding, batch_size: int, context: int) -> np.ndarray:
  """Returns the rows of a [batch_size, context] array of which this process's devices hold a part, in order."""
  indices = sharding.addressable_devices_indices_map((batch_size, context)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in indices if index is not None]))


def host_batches(
  windows: AnyWindows,
  batch_size: int,
  rows: np.ndarray,
  first_step: int,
  num_steps: int | None,
  context: int,
  num_threads: int,
  vocab_size: int = 256,
) -> Iterator[tuple[int, Batch]]:
  """Yields (step, the given rows of the global batch), read ahead by threads."""

  def read(step: int) -> tuple[int, Batch]:
    x_RT, length_R = np.zeros((len(rows), context), token_dtype(vocab_size)), np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
      length_R[i] = windows.read(step * batch_size + int(row), x_RT[i])
    check_bytes(x_RT, vocab_size)
    if not isinstance(windows, ConsecutiveSegments | MixedSegments):
      return step, Batch(x_RT, length_R)
    return step, Batch(x_RT, length_R, np.array([windows.is_fresh(step * batch_size + int(row)) for row in rows]))

  last = 2**62 if num_steps is None else num_steps
  if last <= first_step:
    return iter(())
  steps = grain.MapDataset.range(first_step, last).map(read)
  ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
  return iter(steps.to_iter_dataset(ahead))


def _to_devices(
  host: Iterator[tuple[int, Batch]], rows: np.ndarray, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[tuple[int, Batch]]:
  """Global arrays of the host's rows, a few of them on their way at once."""
  lengths_sharding = _rows_sharding(sharding)
  place = {int(row): i for i, row in enumerate(rows)}

  def globally(array: np.ndarray | jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    def part(index):
      first, last, _ = index[0].indices(batch_size)
      i = place[first]
      return array[(slice(i, i + last - first), *index[1:])]  # a device's rows are consecutive, and so in `rows`

    return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

  queue: deque[tuple[int, Batch]] = deque()
  for step, batch in host:
    of_rows = (globally(array, lengths_sharding) for array in batch[1:] if array is not None)
    queue.append((step, Batch(globally(batch.x_BT, sharding), *of_rows)))
    if len(queue) > _AHEAD:
      yield queue.popleft()
  yield from queue


def _rows_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
  """Returns the sharding of a [batch] array whose rows lie where those of the [batch, context] array do."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return sharding.update(spec=jax.sharding.PartitionSpec(*sharding.spec[:1]))
  if isinstance(sharding, jax.sharding.SingleDeviceSharding):
    return sharding
  raise TypeError(f"batches need a NamedSharding or a SingleDeviceSharding, not {type(sharding).__name__}")


@functools.lru_cache(maxsize=64)  # the same for all draws of an epoch
def _random_below(bound: int, seed: int, epoch: int) -> int:
  return int(np.random.default_rng((seed, epoch)).integers(bound))
