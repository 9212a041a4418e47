"""What is packed is what was there: folders, archives, records, images and books."""

import bz2
import dataclasses
import gzip
import json
import pathlib
import tarfile
import zipfile

import numpy as np
import pytest
import tfds_copies
from packed_folders import PLAIN, TEXTS, contents, pack, write_texts

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.config.parsing import attribute_texts
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_path, open_source
from megabyte_jax.errors import ConfigError, DataError


def test_a_folder_packed_is_the_folder(tmp_path, capsys):
  pack(write_texts(tmp_path / "texts"), tmp_path / "packed")
  assert "3 documents, 331 bytes" in capsys.readouterr().out
  pack(tmp_path / "texts/a.txt", tmp_path / "one")
  assert f"one: 1 document, {len(TEXTS['a.txt'])} bytes" in capsys.readouterr().out
  source = open_path(str(tmp_path / "packed"), PLAIN)
  assert contents(source) == TEXTS and not (tmp_path / "packed.part").exists()
  manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
  assert (manifest["bytes"], manifest["documents"], manifest["skipped"]) == (331, 3, 0)
  prepare.main(["verify", str(tmp_path / "packed")])
  pack(tmp_path / "texts", tmp_path / "packed")  # nothing left to do
  (tmp_path / "texts" / "d.txt").write_bytes(b"more")
  with pytest.raises(DataError, match="remove it or name another"):
    pack(tmp_path / "texts", tmp_path / "packed")


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--image-size=32", "--image-size goes with --form=image, but the form is bytes"),
    ("--max-pixels=100", "--max-pixels goes with --form=image"),
    ("--convert-images", "--convert-images goes with --form=image"),
    ("--encoding=mulaw8", "--encoding goes with --form=audio"),
  ],
)
def test_settings_of_another_form_are_refused(tmp_path, flag, message):
  with pytest.raises(ConfigError, match=message):
    prepare.main(["pack", str(write_texts(tmp_path / "texts")), str(tmp_path / "packed"), flag])
  assert not (tmp_path / "packed").exists()


def help_of(capsys, command):
  with pytest.raises(SystemExit):
    prepare.parse_arguments([command, "--help"])
  return "".join(capsys.readouterr().out.split())  # lines are broken at hyphens, too


def test_the_help_says_what_the_config_does(capsys, monkeypatch):
  texts = attribute_texts(DataConfig)
  assert texts.keys() == {field.name for field in dataclasses.fields(DataConfig)}
  assert texts["validation"] == texts["train"] and texts["train"].endswith("Empty where a split does not exist")
  shown = {"pack": ("image_tiles", "max_pixels", "scan_patch", "sample_rate", "tfds_dir", "skip_bad", "cache_dir")}
  shown["tokenizer"] = ("raw", "skip_bad", "tfds_dir", "cache_dir")
  for command, names in shown.items():
    said = help_of(capsys, command)
    for name in names:
      assert "".join(texts[name].split()) in said
  monkeypatch.setattr(DataConfig, "__doc__", None)  # as under python -OO
  assert "{pcm16,mulaw8}default:pcm16" in help_of(capsys, "pack")


def test_a_bucket_is_not_packed_into(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match=r"FOLDER=gs://b/p is not on this machine's disks; write to a disk, then copy"):
    pack("nothing there", "gs://b/p")
  assert list(tmp_path.iterdir()) == []


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
