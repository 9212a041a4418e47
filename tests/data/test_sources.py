import itertools
import shutil

import numpy as np
import pytest

from megabyte_jax.config import DataConfig
from megabyte_jax.data import files
from megabyte_jax.data.open_data import open_path, open_source
from megabyte_jax.data.read_ahead import read_ahead
from megabyte_jax.data.sources import Joined, Mixture
from megabyte_jax.data.subwords.source import text_of
from megabyte_jax.errors import ConfigError, DataError

PLAIN = DataConfig()


def all_bytes(source):
  return b"".join(source.read(i, 0, int(n)).tobytes() for i, n in enumerate(source.lengths))


def make_folder(path):
  (path / "b").mkdir(parents=True)
  (path / "b" / "two.txt").write_bytes(b"second")
  (path / "a.txt").write_bytes(b"first")
  (path / "c.bin").write_bytes(bytes(range(256)))
  (path / ".hidden").write_bytes(b"no")
  return path


def test_shipped_text_is_whole_and_disjoint():
  train, validation = open_source(PLAIN, "train"), open_source(PLAIN, "validation")
  assert train.names == ["moby_dick.txt", "pride_and_prejudice_first_nine_tenths.txt"]
  assert int(train.lengths.sum()) == 1_821_240 and int(validation.lengths.sum()) == 68_525
  assert train.read(1, 616_243 - 8, 616_243).tobytes().endswith(b"\n")
  assert train.fingerprint != validation.fingerprint


def test_file_folder_glob_and_list(tmp_path):
  folder = make_folder(tmp_path / "data")
  assert open_path(str(folder), PLAIN).names == ["a.txt", "b/two.txt", "c.bin"]
  assert all_bytes(open_path(str(folder), PLAIN)) == b"firstsecond" + bytes(range(256))
  assert open_path(f"{folder}/**/*.txt", PLAIN).names == ["a.txt", "b/two.txt"]
  assert open_path(f"{folder}/a.txt", PLAIN).names == ["a.txt"]
  both = open_path(f"{folder}/c.bin, {folder}/*.txt", PLAIN)
  assert isinstance(both, Joined) and list(both.names) == ["c.bin", "a.txt"]
  assert both.read(1, 1, 4).tobytes() == b"irs" and both.read(0, 255, 256)[0] == 255


def test_fingerprints_are_made_once_and_when_they_are_asked_for(tmp_path, monkeypatch):
  folder, looked_into = make_folder(tmp_path / "data"), []
  looks = files.fingerprint_files
  monkeypatch.setattr(files, "fingerprint_files", lambda *given: looked_into.append(given) or looks(*given))
  data = DataConfig(train=f"{folder}/a.txt,{folder}/c.bin", train_weights=(1.0, 2.0))
  joined, mixture = open_path(data.train, data), open_source(data, "train")
  assert text_of(joined) is joined and text_of(mixture) is mixture and not looked_into
  for source in (joined, mixture):
    assert source.fingerprint == source.fingerprint
  assert len(looked_into) == 4 and joined.fingerprint != mixture.fingerprint


def test_reading_outside_a_document_is_an_error(tmp_path):
  source = open_path(str(make_folder(tmp_path / "data")), PLAIN)
  for start, stop in ((0, 6), (-1, 2), (3, 2)):
    with pytest.raises(IndexError, match=r"a\.txt"):
      source.read(0, start, stop)
  assert source.read(0, 5, 5).size == 0


def test_fingerprint_follows_names_sizes_and_contents_alone(tmp_path):
  folder = make_folder(tmp_path / "data")
  first = open_path(str(folder), PLAIN).fingerprint
  moved = shutil.copytree(folder, tmp_path / "elsewhere")
  assert open_path(str(moved), PLAIN).fingerprint == first
  (moved / "a.txt").write_bytes(b"fIrst")
  assert open_path(str(moved), PLAIN).fingerprint != first
  (moved / "a.txt").write_bytes(b"first")
  (moved / "a.txt").rename(moved / "aa.txt")
  assert open_path(str(moved), PLAIN).fingerprint != first


def test_fingerprint_of_a_big_file_reads_little(tmp_path, monkeypatch):
  path = tmp_path / "big"
  with open(path, "wb") as file:
    file.truncate(1 << 32)
  seen = []
  read = files.read_block
  monkeypatch.setattr(files, "read_block", lambda *a: seen.append(len(read(*a))) or read(*a))
  assert open_path(str(path), PLAIN).fingerprint
  assert sum(seen) < 1 << 16


def test_weights_make_a_mixture(tmp_path):
  folder = make_folder(tmp_path / "data")
  data = DataConfig(train=f"{folder}/a.txt,{folder}/c.bin", train_weights=(3.0, 1.0))
  source = open_source(data, "train")
  assert isinstance(source, Mixture) and source.weights == (3.0, 1.0)
  other = open_source(DataConfig(train=data.train, train_weights=(1.0, 1.0)), "train")
  assert source.fingerprint != other.fingerprint
  for bad in ((1.0,), (1.0, 0.0), (1.0, -1.0)):
    with pytest.raises(ConfigError, match="train_weights"):
      open_source(DataConfig(train=data.train, train_weights=bad), "train")


def test_missing_and_empty_data_are_named(tmp_path):
  with pytest.raises(ConfigError, match=r"config\.data\.test is empty"):
    open_source(PLAIN, "test")
  with pytest.raises(ConfigError, match="sample:text/train"):
    open_path("sample:nothing", PLAIN)
  with pytest.raises(ConfigError, match="comma"):
    open_path("a,,b", PLAIN)
  with pytest.raises(DataError, match=f"{tmp_path}/none does not exist"):
    open_path(f"{tmp_path}/none", PLAIN)
  with pytest.raises(DataError, match="no files in folder"):
    open_path(str(tmp_path), PLAIN)
  with pytest.raises(DataError, match="no file matches"):
    open_path(f"{tmp_path}/*.txt", PLAIN)


def test_empty_files_stop_or_are_skipped_and_counted(tmp_path):
  folder = make_folder(tmp_path / "data")
  (folder / "empty.txt").write_bytes(b"")
  with pytest.raises(DataError, match=r"empty\.txt is empty.*skip_bad"):
    open_path(str(folder), PLAIN)
  source = open_path(str(folder), DataConfig(skip_bad=True))
  assert source.skipped == 1 and len(source.names) == 3
  with pytest.raises(DataError, match="empty or unreadable"):
    open_path(str(folder / "empty.txt"), DataConfig(skip_bad=True))


def test_a_file_cut_short_or_gone_while_it_is_read_is_an_error(tmp_path):
  path = tmp_path / "data.bin"
  path.write_bytes(bytes(100_000))
  source = open_path(str(path), PLAIN)
  assert source.read(0, 99_000, 100_000).size == 1000
  path.write_bytes(b"short")
  with pytest.raises(DataError, match=r"data\.bin is no longer the 100,000 bytes"):
    source.read(0, 99_000, 100_000)
  path.unlink()
  with pytest.raises(DataError, match="no longer"):
    source.read(0, 0, 10)


def test_bytes_handed_out_are_the_callers_own(tmp_path):
  (tmp_path / "x").write_bytes(b"abc")
  source = open_path(str(tmp_path / "x"), PLAIN)
  got = source.read(0, 0, 3)
  got[:] = 0
  assert source.read(0, 0, 3).tobytes() == b"abc" and got.dtype == np.uint8


def test_reading_ahead_keeps_the_order_and_passes_errors_on(tmp_path):
  source = open_path("sample:text/train", PLAIN)
  spans = [(i % 2, 1000 * i, 1000 * i + 7 * i) for i in range(100)]
  for threads in (0, 1, 3):
    found = [x.tobytes() for x in read_ahead(source, spans, threads)]
    assert found == [source.read(*span).tobytes() for span in spans]
    endless = read_ahead(source, ((0, 0, 5) for _ in itertools.count()), threads)
    assert [x.size for x in itertools.islice(endless, 50)] == [5] * 50
    endless.close()
  (tmp_path / "x").write_bytes(bytes(100))
  source = open_path(str(tmp_path / "x"), PLAIN)
  (tmp_path / "x").write_bytes(b"")
  with pytest.raises(DataError, match="no longer"):
    list(read_ahead(source, [(0, 0, 1)] * 20, 2))
