"""Rows of recurrent models go on from step to step within a document; what each reads is arithmetic."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megabyte_jax.config import DataConfig
from megabyte_jax.data.batches import draw_batches, open_windows
from megabyte_jax.data.consecutive_segments import ConsecutiveSegments, open_segments, shared_out
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.sources import Mixture
from megabyte_jax.errors import ConfigError, DataError


class Documents:
  """Documents of 16-bit numbers: the document's number, and the place of each pair of bytes."""

  slow, joinable, skipped, fingerprint = False, True, 0, "documents"

  def __init__(self, *lengths, unit=1, first=0):
    self.lengths, self.unit, self.first = np.array(lengths, np.int64), unit, first
    self.names = [f"document {i}" for i in range(len(lengths))]

  def read(self, document, start, stop):
    assert 0 <= start <= stop <= self.lengths[document]
    places = np.arange(start, stop)
    return np.where(places % 2 == 0, self.first + document, places // 2).astype(np.uint8)


LENGTHS = (0, 90, 3, 41, 16, 64, 1, 0, 130)  # of segments of 8: 12 + 1 + 6 + 2 + 8 + 1 + 17 = 47


def taken(source, rows, steps, **options):
  windows = open_windows(source, context=8, seed=5, consecutive_rows=rows)
  return [batch for _, batch in draw_batches(windows, batch_size=rows, num_steps=steps, **options)]


def test_each_row_continues_its_document_until_that_ends():
  source = Documents(*LENGTHS)
  segments = ConsecutiveSegments(source, 8, 3, 4)
  assert segments.segments == 47 and segments.steps_per_epoch == 11
  for row, (step, following) in itertools.product(range(4), itertools.pairwise(range(40))):
    a, b = segments.segment_of(step, row), segments.segment_of(following, row)
    at_end = a.start + a.length == source.lengths[a.document]
    assert a.length == 8 or at_end
    new_run = following % 11 == 0
    assert b.fresh == (at_end or new_run)
    assert new_run or (b.start == 0 if at_end else (b.document, b.start) == (a.document, a.start + 8))
  assert segments.segment_of(0, 2).fresh


def test_an_epoch_reads_every_segment_at_most_once_and_almost_all():
  segments = ConsecutiveSegments(Documents(*LENGTHS), 8, 3, 4)
  orders = []
  for epoch in range(3):
    steps = range(11 * epoch, 11 * epoch + 11)
    read = [segments.segment_of(step, row)[:2] for row in range(4) for step in steps]
    assert len(set(read)) == len(read) == 44
    orders.append(tuple(dict.fromkeys(document for document, _ in read)))
  assert len(set(orders)) == 3  # another order of documents in each
  assert ConsecutiveSegments(Documents(*LENGTHS), 8, 4, 4)._order(0)[0].tolist() != segments._order(0)[0].tolist()


def test_batches_hold_the_bytes_and_start_anywhere():
  source = Documents(*LENGTHS)
  every = taken(source, 4, 30)
  segments = open_segments(source, context=8, seed=5, rows=4)
  for (step, batch), row in itertools.product(enumerate(every), range(4)):
    document, start, length, fresh = segments.segment_of(step, row)
    assert (batch.length_B[row], batch.fresh_B[row]) == (length, fresh)
    np.testing.assert_array_equal(batch.x_BT[row, :length], source.read(document, start, start + length))
    assert not batch.x_BT[row, length:].any()
  for first in (1, 10, 11, 29):
    for a, b in zip(every[first:], taken(source, 4, 30, first_step=first), strict=True):
      jax.tree.map(np.testing.assert_array_equal, a, b)


def test_they_are_put_on_a_mesh():
  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  on_devices = taken(Documents(*LENGTHS), 4, 3, sharding=NamedSharding(mesh, PartitionSpec("data")))
  for a, b in zip(on_devices, taken(Documents(*LENGTHS), 4, 3), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert len(a.fresh_B.sharding.device_set) == 2


def test_a_mixture_shares_out_the_rows():
  first, second = Documents(*LENGTHS), Documents(300, 20, first=100)
  windows = open_segments(Mixture([first, second], [1.0, 3.0]), context=8, seed=0, rows=6)
  assert [part.rows for part in windows.parts] == [2, 4] == shared_out(6, [1, 3])
  x_T, alone = np.zeros(8, np.uint8), np.zeros(8, np.uint8)
  for draw in range(60):
    step, row = divmod(draw, 6)
    part, own = (0, row) if row < 2 else (1, row - 2)
    assert windows.read(draw, x_T) == windows.parts[part].read(step * windows.parts[part].rows + own, alone)
    np.testing.assert_array_equal(x_T, alone)
    assert (x_T[0] >= 100) == (row >= 2) and windows.is_fresh(draw) == windows.parts[part].segment_of(step, own).fresh
  assert sum(shared_out(7, [1.0, 1.0, 1.0])) == 7
  with pytest.raises(ConfigError, match="without a row"):
    open_segments(Mixture([first, second], [1.0, 30.0]), context=8, seed=0, rows=6)


def test_what_cannot_be_read_so_is_said():
  with pytest.raises(DataError, match="47 segments of 8 bytes, fewer than the 48 rows"):
    open_segments(Documents(*LENGTHS), context=8, seed=0, rows=48)
  with pytest.raises(DataError, match=r"^document 0 has 1 segment of 8 bytes, fewer than the 2 rows"):
    open_segments(Documents(5), context=8, seed=0, rows=2)
  with pytest.raises(ConfigError, match="cuts apart the 2 bytes"):
    open_segments(Documents(64, unit=2), context=7, seed=0, rows=1)


def test_files_are_read_so(tmp_path):
  for name, text in (("a", b"abcdefghijkl"), ("b", b"0123456")):
    (tmp_path / f"{name}.txt").write_bytes(text)
  batches = taken(open_path(str(tmp_path), DataConfig()), 1, 3)
  assert b"".join(b.x_BT[0, : b.length_B[0]].tobytes() for b in batches) in (
    b"abcdefghijkl0123456",
    b"0123456abcdefghijkl",
  )
