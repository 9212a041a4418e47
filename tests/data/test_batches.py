import itertools

import grain
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from processes import run

from megabyte_jax.config import DataConfig, PerceiverARConfig
from megabyte_jax.data.batches import batches, host_batches, open_windows, rows_of_this_process
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.sources import Mixture
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.evaluation.windows import windows_of


class Numbers:
  """Documents whose byte i says where it is: the low byte of a running count over all documents."""

  unit, slow, skipped, fingerprint = 1, False, 0, "numbers"

  def __init__(self, *lengths, joinable=True):
    self.lengths, self.joinable = np.array(lengths, np.int64), joinable
    self.names = [f"document {i}" for i in range(len(lengths))]
    self.starts = np.cumsum([0, *lengths])

  def read(self, document, start, stop):
    assert 0 <= start <= stop <= self.lengths[document]
    return (np.arange(start, stop) + self.starts[document]).astype(np.uint8)


def take(source, **options):
  options = {"batch_size": 8, "context": 16, "seed": 3, "num_steps": 20, **options}
  return list(batches(source, **options))


def test_rows_are_the_bytes_of_the_source():
  source = open_path("sample:text/validation", DataConfig())
  text = source.read(0, 0, int(source.lengths[0])).tobytes()
  for step, batch in take(source, context=100, num_steps=5):
    assert batch.x_BT.dtype == np.uint8 and batch.x_BT.shape == (8, 100), step
    assert all(row.tobytes() in text for row in batch.x_BT) and (batch.length_B == 100).all()


@pytest.mark.parametrize("documents", ["packed", "whole"])
def test_resuming_at_any_step_gives_the_same_batches(documents):
  source = Numbers(100, 37, 300)
  every = take(source, documents=documents, num_steps=40)
  for first in (0, 1, 17, 39):
    again = take(source, documents=documents, first_step=first, num_steps=40, num_threads=first % 3)
    assert [step for step, _ in again] == list(range(first, 40))
    for (_, a), (_, b) in zip(every[first:], again, strict=True):
      np.testing.assert_array_equal(a.x_BT, b.x_BT)
      np.testing.assert_array_equal(a.length_B, b.length_B)
  assert take(source, first_step=40, num_steps=40) == []


@pytest.mark.parametrize("mixed", [False, True])
def test_one_two_and_four_hosts_see_the_same_global_batches_across_epochs(mixed):
  source = Mixture([Numbers(100, 37), Numbers(555)], (1, 3)) if mixed else Numbers(100, 37, 300)
  whole = take(source, num_steps=20)  # 160 rows of about 26 windows: many epochs
  for hosts in (2, 4):
    windows = open_windows(source, context=16, seed=3)
    rows = np.arange(8).reshape(hosts, -1)
    streams = [host_batches(windows, 8, r, 0, 20, 16, 2) for r in rows]
    for (_, expected), *parts in zip(whole, *streams, strict=True):
      np.testing.assert_array_equal(expected.x_BT, np.concatenate([batch.x_BT for _, batch in parts]))


def test_each_window_of_a_packed_epoch_is_seen_once_and_cut_elsewhere_in_the_next():
  windows = open_windows(Numbers(70, 1, 140), context=16, seed=0)
  n = windows.per_epoch
  assert n == 211 // 16 - 1
  starts = []
  for epoch in range(4):
    drawn = [windows.place_of(epoch * n + i) for i in range(n)]
    places = sorted(windows.source.starts[place.document] + place.start for place in drawn)
    assert np.all(np.diff(places) == 16) and places[0] >= 0 and places[-1] + 16 <= 211
    starts.append((places[0], tuple(place.start for place in drawn)))
  assert len({offset for offset, _ in starts}) > 1 and len({order for _, order in starts}) == 4


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_order_is_that_of_grain(seed):
  windows = open_windows(Numbers(*[16] * 50), context=16, seed=seed, documents="whole")
  order = grain.MapDataset.range(50).shuffle(windows.seed).repeat()
  assert [windows.place_of(i).document for i in range(170)] == [order[i] for i in range(170)]


def test_packed_windows_run_from_one_document_into_the_next():
  source = Numbers(5, 3, 1, 40)
  for _, batch in take(source, context=16, num_steps=5):
    for row in batch.x_BT:
      np.testing.assert_array_equal(np.diff(row.astype(int)), 1)


def test_whole_windows_stay_within_documents_and_hold_every_byte_once_an_epoch():
  source = Numbers(5, 16, 33)
  windows = open_windows(source, context=16, seed=0, documents="whole")
  assert windows.per_epoch == 1 + 1 + 3
  for epoch in range(3):
    seen = []
    for i in range(5):
      row = np.zeros(16, np.uint8)
      length = windows.read(epoch * 5 + i, row)
      assert not row[length:].any()
      seen += row[:length].tolist()
    assert sorted(seen) == list(range(54))


@pytest.mark.parametrize("lengths", [(5, 8, 9, 33), (100,), (12, 13, 16, 0, 17)])
def test_windows_with_latents_are_those_of_evaluation(lengths):
  """PerceiverAR is trained on what it is measured on: same starts, ends and latents, each once an epoch."""
  config = PerceiverARConfig(context=16, latents=6, width=8, num_layers=1, num_heads=1)
  expected = [(d, w.start, w.length) for d, length in enumerate(lengths) for w in windows_of(length, config)]
  windows = open_windows(Numbers(*lengths), context=16, seed=0, documents="whole", latents=6)
  assert windows.per_epoch == len(expected)
  for epoch in range(2):
    places = [windows.place_of(epoch * len(expected) + i) for i in range(len(expected))]
    assert sorted(tuple(place) for place in places) == expected


def test_packed_windows_with_latents_reach_every_byte():
  windows = open_windows(Numbers(70, 1, 140), context=16, seed=0, latents=4)
  assert windows.per_epoch == (211 - 16) // 2
  ends = []
  for i in range(windows.per_epoch):
    place = windows.place_of(i)
    ends.append(int(windows.source.starts[place.document]) + place.start + place.length)
  assert sorted(ends) == list(range(min(ends), min(ends) + 2 * len(ends), 2))
  assert min(ends) >= 16 and max(ends) <= 211
  with pytest.raises(ConfigError, match="3 latents, which move by half, cut apart the 2 bytes of a sample"):
    source = Numbers(100)
    source.unit = 2
    open_windows(source, context=16, seed=0, latents=3)


def test_documents_that_may_not_be_joined_are_cut_whole():
  assert not open_windows(Numbers(48, 48, joinable=False), context=48, seed=0, documents="packed").packed


def test_a_mixture_keeps_its_proportions():
  source = Mixture([Numbers(400), Numbers(100)], (1.0, 3.0))
  windows = open_windows(source, context=10, seed=0)
  part = [windows._order[i][0] for i in range(400)]
  assert part.count(0) == 100 and 20 <= part[:100].count(0) <= 30


def test_seeds_differ():
  a, b = (np.concatenate([x.x_BT for _, x in take(Numbers(5000), seed=s)]) for s in (0, 1))
  assert not np.array_equal(a, b)


def test_too_little_data_is_named():
  with pytest.raises(DataError, match=r"document 0 has 15 bytes, fewer than the context of 16.*whole"):
    take(Numbers(15))
  [(_, batch)] = take(Numbers(15), documents="whole", num_steps=1)
  assert (batch.length_B == 15).all() and not batch.x_BT[:, 15].any()
  assert take(Numbers(16), num_steps=1)[0][1].x_BT[0].tolist() == list(range(16))


def test_an_error_while_reading_ends_the_batches(tmp_path):
  path = tmp_path / "data.bin"
  path.write_bytes(bytes(10_000))
  stream = batches(open_path(str(path), DataConfig()), batch_size=8, context=16, seed=0)
  next(stream)
  path.write_bytes(b"short")
  with pytest.raises(DataError, match="no longer"):
    list(itertools.islice(stream, 100))


def test_starting_at_step_a_million_reads_nothing_of_the_steps_before(monkeypatch):
  source, reads = open_path("sample:text/train", DataConfig()), []
  read = source.read
  monkeypatch.setattr(source, "read", lambda *place: reads.append(place) or read(*place))
  stream = batches(source, batch_size=16, context=1024, seed=0, first_step=1_000_000, num_steps=1_000_002)
  assert [step for step, _ in stream] == [1_000_000, 1_000_001]
  assert 32 <= len(reads) <= 2 * 2 * 16  # a window may be of two documents


def test_sharded_batches_equal_the_plain_ones():
  devices = np.array(jax.devices()[: 1 << (len(jax.devices()).bit_length() - 1)])
  for shape, spec in (((-1, 1), ("data", "seq")), ((1, -1), ("data", "seq")), ((-1, 1), (None,))):
    sharding = NamedSharding(Mesh(devices.reshape(shape), ("data", "seq")), PartitionSpec(*spec))
    plain, sharded = (take(Numbers(100, 400), num_steps=4, sharding=s) for s in (None, sharding))
    assert [step for step, _ in sharded] == [0, 1, 2, 3]
    for (_, a), (_, b) in zip(plain, sharded, strict=True):
      np.testing.assert_array_equal(a.x_BT, b.x_BT)
      np.testing.assert_array_equal(a.length_B, b.length_B)
      assert b.x_BT.sharding == sharding


class PartOfMesh:
  """A sharding as one of several hosts sees it: only some devices are its own."""

  def __init__(self, rows):
    self.rows = rows

  def addressable_devices_indices_map(self, shape):
    return {i: (slice(r, r + 1, None), slice(None)) for i, r in enumerate(self.rows)}


def test_a_host_reads_only_the_rows_its_devices_hold():
  assert rows_of_this_process(PartOfMesh([6, 2, 2]), 8, 16).tolist() == [2, 6]


TWO_HOSTS = """
import sys, jax, numpy as np
from megabyte_jax.parallel import distributed
distributed.start()
from jax.sharding import NamedSharding, PartitionSpec as P
from megabyte_jax.config import ConfigError, DataConfig, PerceiverARConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import open_path
sharding = NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))
source = open_path("sample:text/train", DataConfig())
for step, batch in batches(source, batch_size=8, context=64, seed=1, num_steps=3, sharding=sharding):
  for shard in batch.x_BT.addressable_shards:
    print("row", step, shard.index[0].start, bytes(np.asarray(shard.data)).hex(), file=sys.stderr)
"""


def test_two_real_processes_hold_the_rows_of_one():
  output = run(2, 2, "-c", TWO_HOSTS)
  lines = [line.split() for text in output for line in text.splitlines() if line.startswith("row ")]
  found = {(int(step), int(row)): bytes.fromhex(data) for _, step, row, data in lines}
  source = open_path("sample:text/train", DataConfig())
  expected = take(source, context=64, seed=1, num_steps=3)
  assert len(found) == 12
  for (step, row), data in found.items():
    assert expected[step][1].x_BT[row : row + 2].tobytes() == data
