import bz2
import gzip
import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import tfds_copies
from array_record.python import array_record_module

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_path, open_source
from megabyte_jax.data.packing import pack_writer, prepare_tfds
from megabyte_jax.errors import ConfigError, DataError

PLAIN = DataConfig()
TEXTS = {"a.txt": b"first", "b/two.txt": b"second " * 10, "c.txt": bytes(range(256))}


def pack(*arguments):
  prepare.main(["pack", *map(str, arguments)])


def write_texts(folder):
  for name, data in TEXTS.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  return folder


def contents(source):
  pairs = zip(source.names, source.lengths, strict=True)
  return {name: source.read(i, 0, int(n)).tobytes() for i, (name, n) in enumerate(pairs)}


def test_a_folder_packed_is_the_folder(tmp_path, capsys):
  pack(write_texts(tmp_path / "texts"), tmp_path / "packed")
  assert "3 documents, 331 bytes" in capsys.readouterr().out
  source = open_path(str(tmp_path / "packed"), PLAIN)
  assert contents(source) == TEXTS and not (tmp_path / "packed.part").exists()
  manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
  assert (manifest["bytes"], manifest["documents"], manifest["skipped"]) == (331, 3, 0)
  prepare.main(["verify", str(tmp_path / "packed")])
  pack(tmp_path / "texts", tmp_path / "packed")  # nothing left to do
  (tmp_path / "texts" / "d.txt").write_bytes(b"more")
  with pytest.raises(DataError, match="remove it or name another"):
    pack(tmp_path / "texts", tmp_path / "packed")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz", "txt.gz", "txt.bz2"])
def test_archives_are_packed(tmp_path, kind):
  folder, path = write_texts(tmp_path / "texts"), tmp_path / f"texts.{kind}"
  expected = TEXTS
  if kind == "zip":
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
      for name, data in {**TEXTS, ".hidden": b"no"}.items():
        archive.writestr(name, data)
  elif "tar" in kind:
    with tarfile.open(path, f"w:{kind[4:]}") as archive:
      for name in TEXTS:
        archive.add(folder / name, arcname=name)
  else:
    path.write_bytes((gzip if kind.endswith("gz") else bz2).compress(TEXTS["c.txt"]))
    expected = {"texts.txt": TEXTS["c.txt"]}
  pack(path, tmp_path / "packed")
  assert contents(open_path(str(tmp_path / "packed"), PLAIN)) == expected
  whole = path.read_bytes()
  for keep in (0.4, 0.98) if kind != "tar" else (0.15, 0.3):
    path.write_bytes(whole[: int(len(whole) * keep) // (512 if kind == "tar" else 1) * (512 if kind == "tar" else 1)])
    with pytest.raises(DataError, match=r"damaged or cut short"):
      pack(path, tmp_path / f"cut{keep}")
    assert not (tmp_path / f"cut{keep}").exists()


def test_packed_images_are_the_images_and_their_settings_are_kept(tmp_path):
  settings = {"form": "image", "image_size": 32, "scan_patch": 48}
  flags = [f"--{name}={value}" for name, value in settings.items()]
  pack("sample:images/validation", tmp_path / "packed", *flags)
  data = DataConfig(**settings)
  source = open_path(str(tmp_path / "packed"), data)
  assert contents(source) == contents(open_path("sample:images/validation", data))
  assert not source.joinable
  for changed in ({"image_size": 64}, {"scan_patch": 12}, {"form": "bytes"}, {"scan": "raster"}):
    with pytest.raises(ConfigError, match=f"packed was packed with {next(iter(changed))}="):
      open_path(str(tmp_path / "packed"), DataConfig(**{**settings, **changed}))


def test_packed_books_train_whole_and_packed(tmp_path):
  tfds_copies.pg19(tmp_path / "tfds")
  pack("tfds:pg19:train", tmp_path / "books", f"--tfds_dir={tmp_path}/tfds")
  source = open_source(DataConfig(train=str(tmp_path / "books")), "train")
  novel = pathlib.Path(SAMPLE_FOLDER, "text/train/moby_dick.txt").read_text()
  books = [novel[:40_000].encode(), novel[40_000:40_700].encode()]
  assert sorted(contents(source).values()) == sorted(books)  # in the order in which TFDS has shuffled them
  joined = b"".join(contents(source).values())
  for documents in ("packed", "whole"):
    for _, batch in batches(source, batch_size=4, context=256, seed=0, num_steps=30, documents=documents):
      for row, length in zip(batch.x_BT, batch.length_B, strict=True):
        assert row[:length].tobytes() in joined and (documents == "whole" or length == 256)
        assert documents == "packed" or any(row[:length].tobytes() in book for book in books)


def test_bad_items_stop_or_are_skipped_and_counted(tmp_path, capsys):
  folder = write_texts(tmp_path / "texts")
  (folder / "empty.txt").write_bytes(b"")
  with pytest.raises(DataError, match=r"empty\.txt is empty"):
    pack(folder, tmp_path / "packed")
  pack(folder, tmp_path / "packed", "--skip_bad")
  assert "1 skipped" in capsys.readouterr().out
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
    archive.writestr("empty.txt", b"")
    archive.writestr("full.txt", b"full")
  with pytest.raises(DataError, match=r"empty\.txt in .*x\.zip is empty"):
    pack(tmp_path / "x.zip", tmp_path / "zipped")
  pack(tmp_path / "x.zip", tmp_path / "zipped", "--skip_bad")
  assert "1 skipped" in capsys.readouterr().out


class Stop(Exception):
  pass


def test_an_interrupted_pack_goes_on_where_it_was(tmp_path, monkeypatch):
  monkeypatch.setattr(pack_writer, "_SAVE_EVERY", 1000)
  rng = np.random.default_rng(0)
  documents = [(f"{i}", rng.bytes(300)) for i in range(20)]
  request = {"settings": {"form": "bytes"}, "source": "x"}

  def items(first, stop):
    for i in range(first, 20):
      if i == stop:
        raise Stop
      yield documents[i][0], iter([documents[i][1][:100], documents[i][1][100:]])

  first = 0
  for stop in (3, 10, 19):
    writer = pack_writer.PackWriter(str(tmp_path / "p"), request)
    assert writer.items_done == first
    with pytest.raises(Stop):
      writer.write(items(first, stop))
    assert not (tmp_path / "p").exists()
    first = pack_writer.PackWriter(str(tmp_path / "p"), request).items_done
    assert stop - 4 < first <= stop
  other = pack_writer.PackWriter(str(tmp_path / "p"), {**request, "source": "y"})
  assert other.items_done == 0
  pack_writer.PackWriter(str(tmp_path / "p"), request).write(items(first, None))
  assert contents(open_path(str(tmp_path / "p"), PLAIN)) == dict(documents)


def test_killing_it_leaves_nothing_that_looks_whole(tmp_path):
  big = tmp_path / "big"
  big.mkdir()
  block = np.random.default_rng(0).bytes(1 << 23)
  for i in range(14):
    (big / f"{i:02}").write_bytes(block)
  command = [sys.executable, "-m", "megabyte_jax", "prepare", "pack", str(big), str(tmp_path / "packed")]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  part = tmp_path / "packed.part" / "data.bin"
  while process.poll() is None and not (part.exists() and part.stat().st_size > 1 << 26):
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / "packed").exists()
  with pytest.raises(DataError, match="does not exist"):
    open_path(str(tmp_path / "packed"), PLAIN)
  subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
  assert all(x == block for x in contents(open_path(str(tmp_path / "packed"), PLAIN)).values())


NO_ROOM = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from megabyte_jax.commands import command_line
from megabyte_jax.commands import prepare
command_line.run(lambda: prepare.main(["pack", *sys.argv[2:]]))
"""


def test_a_full_disk_is_one_clear_error_and_no_loss(tmp_path):
  (tmp_path / "x").write_bytes(np.random.default_rng(0).bytes(3_000_000))
  command = [sys.executable, "-c", NO_ROOM, "1000000", str(tmp_path / "x"), str(tmp_path / "p")]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode == 1 and "no room for more" in result.stderr and "Traceback" not in result.stderr
  assert not (tmp_path / "p").exists()
  pack(tmp_path / "x", tmp_path / "p")
  assert contents(open_path(str(tmp_path / "p"), PLAIN)) == {"x": (tmp_path / "x").read_bytes()}


def test_packed_data_changed_afterwards_are_refused(tmp_path):
  pack(write_texts(tmp_path / "texts"), tmp_path / "p")
  data, first = tmp_path / "p" / "data.bin", open_path(str(tmp_path / "p"), PLAIN).fingerprint
  whole = data.read_bytes()
  data.write_bytes(whole[:50] + b"X" + whole[51:])
  assert open_path(str(tmp_path / "p"), PLAIN).fingerprint != first
  with pytest.raises(DataError, match=r"data\.bin has changed"):
    prepare.main(["verify", str(tmp_path / "p")])
  data.write_bytes(whole[:-1])
  with pytest.raises(DataError, match="330 bytes instead of 3 and 331"):
    open_path(str(tmp_path / "p"), PLAIN)
  data.unlink()
  with pytest.raises(DataError, match=r"data\.bin cannot be read"):
    open_path(str(tmp_path / "p"), PLAIN)
  (tmp_path / "p" / "manifest.json").write_text("{")
  with pytest.raises(DataError, match=r"manifest\.json is not JSON"):
    open_path(str(tmp_path / "p"), PLAIN)


def crc32c(data):
  """Bit by bit, as RFC 3720 defines it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def tfrecord(record):
  def masked(data):
    crc = crc32c(data)
    return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

  head = len(record).to_bytes(8, "little")
  return head + masked(head) + record + masked(record)


def as_tfrecords(builder):
  """Turns a small data set into the TFRecord files that most copies are."""
  folder = pathlib.Path(builder.data_dir)
  for path in folder.glob("*array_record*"):
    records = array_record_module.ArrayRecordReader(str(path)).read_all()
    (folder / path.name.replace("array_record", "tfrecord")).write_bytes(b"".join(map(tfrecord, records)))
    path.unlink()
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  return folder


def test_tfrecord_copies_are_converted_by_the_command_in_the_error(tmp_path, capsys):
  builder = tfds_copies.downsampled_imagenet(tmp_path)
  data = DataConfig(form="image", tfds_dir=str(tmp_path))
  spec = "tfds:downsampled_imagenet/64x64:validation"
  before = contents(open_path(spec, data))
  folder = as_tfrecords(builder)
  with pytest.raises(DataError, match="stored as tfrecord") as error:
    open_path(spec, data)
  command = next(line.split() for line in str(error.value).splitlines() if "prepare" in line)
  assert command[:4] == ["python", "-m", "megabyte_jax", "prepare"]
  elsewhere = tmp_path / "elsewhere"
  prepare.main([*command[4:], f"--out={elsewhere}"])
  assert contents(open_path(spec, DataConfig(form="image", tfds_dir=str(elsewhere)))) == before
  prepare.main(command[4:])
  assert contents(open_path(spec, data)) == before and list(folder.glob("*tfrecord*"))
  prepare.main(command[4:])
  assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "length", "missing", "content"])
def test_damaged_tfrecords_are_named(tmp_path, damage):
  folder = as_tfrecords(tfds_copies.downsampled_imagenet(tmp_path))
  [path] = folder.glob("*validation*")
  data = bytearray(path.read_bytes())
  if damage == "content" and not prepare_tfds.fast_crc32c():
    pytest.skip("google-crc32c is not installed")
  if damage == "cut":
    data = data[:-5]
  elif damage == "length":
    data[2] ^= 1
  elif damage == "content":
    data[500] ^= 1
  else:
    data = data[: 16 + int.from_bytes(data[:8], "little")]
  path.write_bytes(data)
  with pytest.raises(DataError, match=rf"{path.name} (is (damaged|cut short)|holds 1 records)"):
    prepare.main(["convert", "tfds:downsampled_imagenet/64x64", f"--tfds_dir={tmp_path}"])
  assert not list(folder.glob("*validation*array_record*")) and not list(folder.glob("*tmp*"))


def test_a_data_set_that_nobody_knows_is_one_line(tmp_path):
  for command in ("build", "convert"):
    with pytest.raises(DataError, match="knows no data set 'nonsense'"):
      prepare.main([command, "tfds:nonsense", f"--tfds_dir={tmp_path}"])
  with pytest.raises(DataError, match="nothing to convert"):
    prepare.main(["convert", "tfds:pg19", f"--tfds_dir={tmp_path}"])
  with pytest.raises(DataError, match=r"manual|by hand"):
    prepare.main(["build", "tfds:imagenet2012", f"--tfds_dir={tmp_path}"])


def test_compressed_files_are_packed_as_what_they_hold_however_they_are_named(tmp_path):
  folder = tmp_path / "set"
  folder.mkdir()
  for name, data in TEXTS.items():
    (folder / f"{pathlib.Path(name).name}.gz").write_bytes(gzip.compress(data))
  expected = {pathlib.Path(name).name: data for name, data in TEXTS.items()}
  pack(folder, tmp_path / "folder")
  pack(f"{folder}/*.gz", tmp_path / "glob")
  pack(",".join(map(str, sorted(folder.iterdir()))), tmp_path / "list")
  for name in ("folder", "glob", "list"):
    assert contents(open_path(str(tmp_path / name), PLAIN)) == expected
  pack(folder, tmp_path / "raw", "--raw")
  assert contents(open_path(str(tmp_path / "raw"), PLAIN)) == {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_archives_records_and_files_are_packed_together(tmp_path):
  zstandard, parquet = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
  folder = write_texts(tmp_path / "set")
  with tarfile.open(tmp_path / "x.tar", "w") as archive:
    archive.add(folder / "a.txt", arcname="inside.txt")
  (folder / "x.tar.zst").write_bytes(zstandard.ZstdCompressor().compress((tmp_path / "x.tar").read_bytes()))
  lines = b'{"text": "one"}\n{"text": ""}\n{"text": "two"}\n'
  (folder / "r.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
  import pyarrow  # noqa: PLC0415

  parquet.write_table(pyarrow.table({"text": ["row", None]}), folder / "t.parquet")
  with pytest.raises(DataError, match=r"t\.parquet, row 1 has no value"):
    pack(folder, tmp_path / "packed", f"--cache-dir={tmp_path}/cache")
  pack(folder, tmp_path / "skipped", "--skip-bad", f"--cache-dir={tmp_path}/cache")
  expected = {**TEXTS, "r.jsonl.zst[0]": b"one", "r.jsonl.zst[1]": b"two", "t.parquet[0]": b"row"}
  source = open_path(str(tmp_path / "skipped"), PLAIN)
  assert contents(source) == {**expected, "x.tar.zst/inside.txt": TEXTS["a.txt"]} and source.skipped == 2


def test_a_damaged_file_among_others_stops_or_is_skipped(tmp_path):
  folder = tmp_path / "set"
  folder.mkdir()
  for name in "abc":
    (folder / f"{name}.txt.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(5000)))
  (folder / "b.txt.gz").write_bytes((folder / "b.txt.gz").read_bytes()[:-100])
  (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": 2}\n'))
  with pytest.raises(DataError, match=r"b\.txt\.gz is damaged or cut short"):
    pack(folder, tmp_path / "packed")
  pack(folder, tmp_path / "skipped", "--skip-bad")
  source = open_path(str(tmp_path / "skipped"), PLAIN)
  assert source.names == ["a.txt", "c.txt", "d.jsonl.gz[0]"] and source.skipped == 2
  with pytest.raises(DataError, match=r"d\.jsonl\.gz, line 2 has no text in its field 'text'"):
    pack(folder / "d.jsonl.gz", tmp_path / "lines")


def test_an_interrupted_pack_of_compressed_records_goes_on(tmp_path, monkeypatch):
  monkeypatch.setattr(pack_writer, "_SAVE_EVERY", 1000)
  texts = [f"text {i} " * 30 for i in range(40)]
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
  write_items, seen = pack_writer.PackWriter._write_items, []

  def stop(self, items, show):
    def until():
      for item in items:
        seen.append(item[0])
        if len(seen) == 25:
          raise Stop
        yield item

    write_items(self, until(), show)

  with monkeypatch.context() as patch:
    patch.setattr(pack_writer.PackWriter, "_write_items", stop)
    with pytest.raises(Stop):
      pack(path, tmp_path / "packed")
    pack(path, tmp_path / "packed")
  assert seen[25] not in ("a.jsonl.gz[0]", "a.jsonl.gz[1]") and len(seen) < 25 + 40
  assert list(contents(open_path(str(tmp_path / "packed"), PLAIN)).values()) == [text.encode() for text in texts]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("bytes", 10**15),
    ("bytes", 0),
    ("documents", 10**15),
    ("documents", 1),
    ("unit", 0),
    ("unit", 10**15),
    ("sha256", {}),
    ("sha256", {"../../secret": "0" * 64}),
  ],
)
def test_a_packed_folder_that_claims_what_it_has_not_is_not_whole(tmp_path, field, value):
  (tmp_path / "text").mkdir()
  for name in ("a", "b"):
    (tmp_path / "text" / name).write_bytes(b"some text, and more")
  prepare.main(["pack", str(tmp_path / "text"), str(tmp_path / "p")])
  path = tmp_path / "p" / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  for use in (lambda: prepare.main(["verify", str(tmp_path / "p")]), lambda: open_path(str(tmp_path / "p"), PLAIN)):
    with pytest.raises(DataError, match=f"{tmp_path}/p.*(instead of|units of|checksum)"):
      use()


@pytest.mark.parametrize("ends", [[30, 20, 38], [-5, 38], [0, 38], [19, 19, 38], [[19, 38]], [19.0, 38.0]])
def test_ends_of_documents_that_cannot_be_are_found_though_their_checksum_is_right(tmp_path, ends):
  (tmp_path / "text").write_bytes(bytes(range(38)))
  prepare.main(["pack", str(tmp_path / "text"), str(tmp_path / "p")])
  np.save(tmp_path / "p" / "ends.npy", np.array(ends))
  path = tmp_path / "p" / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["documents"] = np.size(ends)
  manifest["sha256"]["ends.npy"] = hashlib.sha256((tmp_path / "p" / "ends.npy").read_bytes()).hexdigest()
  path.write_text(json.dumps(manifest))
  for use in (lambda: prepare.main(["verify", str(tmp_path / "p")]), lambda: open_path(str(tmp_path / "p"), PLAIN)):
    with pytest.raises(DataError, match=r"not one after the other|instead of"):
      use()


def test_a_missing_name_is_found_by_verify(tmp_path):
  (tmp_path / "text").write_bytes(bytes(range(38)))
  prepare.main(["pack", str(tmp_path / "text"), str(tmp_path / "p")])
  (tmp_path / "p" / "names.txt").write_bytes(b"")
  path = tmp_path / "p" / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["sha256"]["names.txt"] = hashlib.sha256(b"").hexdigest()
  path.write_text(json.dumps(manifest))
  with pytest.raises(DataError, match=r"names\.txt has 0 names for 1 documents"):
    prepare.main(["verify", str(tmp_path / "p")])
