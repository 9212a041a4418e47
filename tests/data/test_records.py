"""Records of JSONL, Parquet and Hugging Face data sets, and compressed files, read as documents."""

import bz2
import dataclasses
import errno
import gzip
import lzma
import os
import subprocess
import sys

import pytest
from record_files import as_bytes, json_lines, read_all, write_parquet

from megabyte_jax.config import DataConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.packing.pack import pack
from megabyte_jax.data.records import cache, contents, lines
from megabyte_jax.errors import ConfigError, DataError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

COMPRESS = {
  "": lambda data: data,
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}


@pytest.fixture
def data(tmp_path):
  return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_are_read_alone_in_folders_and_in_globs(tmp_path, data, ending):
  folder = tmp_path / "set"
  folder.mkdir()
  compressed = COMPRESS[ending](json_lines())
  (folder / f"a.jsonl{ending}").write_bytes(compressed)
  (folder / f"b.jsonl{ending}").write_bytes(compressed)
  one = open_path(str(folder / f"a.jsonl{ending}"), data)
  assert read_all(one) == as_bytes() and one.names[1] == f"a.jsonl{ending}[1]"
  assert one.read(3, 4990, 5000).tobytes() == b"x" * 10
  for spec in (folder, f"{folder}/*.jsonl{ending}", f"{folder}/a.jsonl{ending},{folder}/b.jsonl{ending}"):
    source = open_path(str(spec), data)
    assert read_all(source) == as_bytes() * 2
  assert len(source.names) == 8 and source.names[-1] == f"b.jsonl{ending}[3]"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_json_is_json_lines(tmp_path, data, ending):
  (tmp_path / f"c4.json{ending}").write_bytes(COMPRESS[ending](json_lines()))
  assert read_all(open_path(f"{tmp_path}/c4.json{ending}", data)) == as_bytes()
  (tmp_path / "c4.json").write_bytes(json_lines())  # uncompressed .json is one document, unless a field is named
  assert read_all(open_path(f"{tmp_path}/c4.json", data)) == [json_lines()]
  assert read_all(open_path(f"{tmp_path}/c4.json#text", data)) == as_bytes()


def test_another_field_is_named_after_a_hash(tmp_path, data):
  (tmp_path / "a.jsonl").write_bytes(json_lines(field="content"))
  (tmp_path / "README.md").write_text("no record")
  with pytest.raises(DataError, match=r"a\.jsonl, line 1 has no field 'text' \(its fields: id, content\); .*FILE#"):
    open_path(f"{tmp_path}/a.jsonl", data)
  for spec in (f"{tmp_path}/a.jsonl#content", f"{tmp_path}#content", f"{tmp_path}/*#content"):
    assert read_all(open_path(spec, data)) == as_bytes()
  with pytest.raises(ConfigError, match=r"names a field, but .* has no records"):
    open_path(f"{tmp_path}/README.md#text", data)
  (tmp_path / "odd#text").write_text("a file with a hash in its name")
  assert read_all(open_path(f"{tmp_path}/odd#text", data)) == [b"a file with a hash in its name"]


def test_files_and_records_of_one_folder_are_all_read(tmp_path, data):
  folder = tmp_path / "set"
  folder.mkdir()
  (folder / "z.txt").write_text("plain")
  (folder / "a.jsonl").write_bytes(json_lines())
  (folder / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
  parquet.write_table(arrow.table({"text": ["row"]}), folder / "c.parquet")
  source = open_path(str(folder), data)
  assert read_all(source) == [b"packed", b"plain", *as_bytes(), b"row"]
  assert list(source.names)[:2] == ["b.txt", "z.txt"]
  raw = open_path(str(folder), dataclasses.replace(data, raw=True))
  assert read_all(raw) == [path.read_bytes() for path in sorted(folder.iterdir())]


BAD = {
  "not JSON": (b'{"text": "a"', r"line 2 is not JSON \(.*at character \d+\)"),
  "a list": (b"[1]", "line 2 is JSON, but not an object"),
  "no field": (b'{"t": "a"}', "line 2 has no field 'text'"),
  "a number": (b'{"text": 5}', "line 2 has no text in its field 'text' but 5"),
  "null": (b'{"text": null}', "line 2 has no text in its field 'text' but null"),
  "not UTF-8": (b'{"text": "\xff"}', r"line 2 is not UTF-8 \(byte 11\)"),
  "half a pair": (b'{"text": "\\ud83d"}', "line 2 has half a surrogate pair"),
  "too deep": (b"[" * 100_000, "line 2 is not JSON"),
  "too many digits": (b'{"text": ' + b"1" * 10_000 + b"}", "line 2 is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, data, name):
  line, message = BAD[name]
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n\n{"text": ""}\n{"text": "two"}\r\n')
  with pytest.raises(DataError, match=rf"a\.jsonl, {message}") as error:
    open_path(f"{tmp_path}/a.jsonl", data)
  said = str(error.value)
  assert "\n" not in said and "--raw" in said
  assert "; leave out and count all such lines with --config.data.skip_bad" in said
  source = open_path(f"{tmp_path}/a.jsonl", dataclasses.replace(data, skip_bad=True))
  assert read_all(source) == [b"one", b"two"] and source.skipped == 2
  with pytest.raises(DataError, match=message):  # also from the index that was just kept
    open_path(f"{tmp_path}/a.jsonl", data)


def test_a_truncated_file_says_so(tmp_path, data):
  whole = json_lines()
  (tmp_path / "a.jsonl").write_bytes(whole[:-30])
  with pytest.raises(DataError, match=r"line 4 is not JSON .*the file ends within this line"):
    open_path(f"{tmp_path}/a.jsonl", data)
  for ending in (".gz", ".bz2", ".xz", ".zst"):
    (tmp_path / f"b.jsonl{ending}").write_bytes(COMPRESS[ending](whole)[:-6])
    with pytest.raises(DataError, match=rf"b\.jsonl{ending} is damaged or cut short"):
      open_path(f"{tmp_path}/b.jsonl{ending}", data)
  assert not [name for name in os.listdir(tmp_path / "cache" / "contents") if not name.endswith(".lock")]


def test_marks_blank_lines_and_long_lines(tmp_path, data, monkeypatch):
  (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines()[:-1] + b"\n \n\r\n")
  assert read_all(open_path(f"{tmp_path}/a.jsonl", data)) == as_bytes()
  (tmp_path / "b.jsonl").write_bytes(json_lines().decode().encode("utf-16"))
  with pytest.raises(DataError, match=r"b\.jsonl is in UTF-16; make it UTF-8: iconv"):
    open_path(f"{tmp_path}/b.jsonl", data)
  monkeypatch.setattr(lines, "_BLOCK", 7)  # lines go over many blocks
  (tmp_path / "c.jsonl").write_bytes(json_lines())
  assert read_all(open_path(f"{tmp_path}/c.jsonl", data)) == as_bytes()
  monkeypatch.setattr(lines, "_LONGEST", 1000)
  (tmp_path / "d.jsonl").write_bytes(json_lines() + b" ")
  with pytest.raises(DataError, match=r"d\.jsonl, line 4 is longer than 1 GiB"):
    open_path(f"{tmp_path}/d.jsonl", data)


def test_the_index_is_built_once_for_each_version_of_a_file(tmp_path, data, monkeypatch):
  path = tmp_path / "a.jsonl"
  path.write_bytes(json_lines())
  scans = []
  scan = lines._scan
  monkeypatch.setattr(lines, "_scan", lambda *args: scans.append(1) or scan(*args))
  before = open_path(str(path), data).fingerprint
  assert open_path(str(path), data).fingerprint == before and len(scans) == 1
  [index] = (tmp_path / "cache" / "indexes").glob("*.index")
  whole = index.read_bytes()
  for changed in (whole[:-5], whole[:-5] + b"12345", b"", b"[" * 100_000 + b"\n"):
    index.write_bytes(changed)
    assert read_all(open_path(str(path), data)) == as_bytes()
    assert index.read_bytes() == whole
  assert len(scans) == 5
  path.write_bytes(json_lines(["another"]))
  assert read_all(open_path(str(path), data)) == [b"another"]
  blocked = tmp_path / "blocked"
  blocked.write_bytes(b"a file where a folder should be")  # also for the superuser
  assert read_all(open_path(str(path), DataConfig(cache_dir=str(blocked)))) == [b"another"]


OPEN = """
import sys
from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.records import lines
scan = lines._scan
lines._scan = lambda *args: print("scanned") or scan(*args)
print(open_path(sys.argv[1], DataConfig(cache_dir=sys.argv[2])).fingerprint)
"""


def test_many_processes_build_one_index(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress(json_lines([f"text {i}" for i in range(20_000)])))
  command = [sys.executable, "-c", OPEN, str(path), str(tmp_path / "cache")]
  processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
  outputs = [process.communicate()[0].split() for process in processes]
  assert sum("scanned" in output for output in outputs) == 1
  assert len({output[-1] for output in outputs}) == 1


def test_a_changed_file_is_no_longer_read(tmp_path, data):
  path = tmp_path / "a.jsonl"
  path.write_bytes(json_lines())
  source = open_path(str(path), data)
  path.write_bytes(json_lines().replace(b'"first"', b'"fi\\rst'))
  with pytest.raises(DataError, match=r"a\.jsonl, line 1 has changed since the data were opened"):
    source.read(0, 0, 5)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, data, ending, monkeypatch):
  text = b"What is compressed is read as what it holds. " * 50
  half = len(text) // 2
  path = tmp_path / f"a.txt{ending}"
  path.write_bytes(COMPRESS[ending](text[:half]) + COMPRESS[ending](text[half:]))  # two streams
  source = open_path(str(path), data)
  assert read_all(source) == [text] and list(source.names) == ["a.txt"]
  with monkeypatch.context() as patch:
    patch.setattr(contents, "decompressing", None)  # the copy is there already
    assert open_path(str(path), data).fingerprint == source.fingerprint
  [copy] = [p for p in (tmp_path / "cache/contents").iterdir() if p.suffix not in (".lock", ".index")]
  copy.write_bytes(text[:-1])  # a copy that is not whole is made anew
  assert read_all(open_path(str(path), data)) == [text]
  path.write_bytes(COMPRESS[ending](b"changed"))
  assert read_all(open_path(str(path), data)) == [b"changed"]
  assert not copy.exists()
  raw = open_path(str(path), dataclasses.replace(data, raw=True))
  assert read_all(raw) == [path.read_bytes()]
  path.write_bytes(COMPRESS[ending](b""))
  with pytest.raises(DataError, match=rf"a\.txt{ending} holds nothing"):
    open_path(str(path), data)


def test_a_compressed_file_that_cannot_be_opened_is_named_or_skipped(tmp_path, data, monkeypatch):
  for name in ("a", "b"):
    (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(name.encode()))
  opened = contents.open_file

  def refuse(path):  # the superuser may read all
    if path.endswith("a.txt.gz"):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return opened(path)

  monkeypatch.setattr(contents, "open_file", refuse)
  with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read \(Permission denied\); skip such files"):
    open_path(f"{tmp_path}/*.gz", data)
  (tmp_path / "c.txt.gz").symlink_to("nothing")
  source = open_path(f"{tmp_path}/*.gz", dataclasses.replace(data, skip_bad=True))
  assert read_all(source) == [b"b"] and source.skipped == 2


def test_what_is_too_large_or_an_archive_is_refused_with_the_command_that_packs_it(tmp_path, data, monkeypatch):
  monkeypatch.setattr(contents, "MOST", 100)
  (tmp_path / "a b.txt.gz").write_bytes(gzip.compress(os.urandom(200)))
  command = r"\n  python -m megabyte_jax prepare pack "
  with pytest.raises(DataError, match=rf"2\d\d compressed bytes.*{command}'.*a b\.txt\.gz' FOLDER\n.*--raw"):
    open_path(f"{tmp_path}/a b.txt.gz", data)
  for name in ("x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.zst"):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(DataError, match=rf"{name} is an archive; pack the files that it h.*{command}.*{name} FOLDER\n"):
      open_path(f"{tmp_path}/{name}", data)
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "x.zip").write_bytes(b"PK")
  (tmp_path / "folder" / "x.txt").write_bytes(b"text")
  together = (
    rf"x\.zip is an archive; pack what .*folder and its archives hold.*{command}\S*/folder FOLDER\n.*leave it out"
  )
  with pytest.raises(DataError, match=together):
    open_path(f"{tmp_path}/folder", data)
  (tmp_path / "folder" / "y.zip").write_bytes(b"PK")
  with pytest.raises(DataError, match=r"x\.zip is an archive, one of 2; pack"):
    open_path(f"{tmp_path}/folder", data)
  source = open_path(f"{tmp_path}/folder", dataclasses.replace(data, skip_bad=True))
  assert read_all(source) == [b"text"] and source.skipped == 2


@pytest.mark.parametrize(
  ("name", "spec", "hint"),
  [("pyarrow", "a.parquet", "records"), ("zstandard", "a.zst", "records"), ("datasets", "", "hf")],
)
def test_a_missing_package_is_one_line_with_the_command(tmp_path, data, monkeypatch, name, spec, hint):
  monkeypatch.setitem(sys.modules, name, None)
  monkeypatch.setitem(sys.modules, f"{name}.parquet", None)
  if spec:
    (tmp_path / spec).write_bytes(b"x")
  with pytest.raises(DataError, match=rf'need {name}, which is not installed: pip install -e "\.\[{hint}\]"$'):
    open_path(f"{tmp_path}/{spec}" if spec else "hf:org/name:train", data)


def test_the_order_is_a_function_of_seed_and_step(tmp_path, data):
  (tmp_path / "a.jsonl").write_bytes(json_lines([f"document {i} " * 20 for i in range(50)]))
  write_parquet(tmp_path / "b.parquet", [f"row {i} " * 20 for i in range(50)], row_group_size=7)
  source = open_path(f"{tmp_path}/a.jsonl,{tmp_path}/b.parquet", data)

  def run(first):
    steps = batches(source, batch_size=4, context=64, seed=3, first_step=first, num_steps=12)
    return {step: batch.x_BT.tobytes() for step, batch in steps}

  whole = run(0)
  assert run(7) == {step: whole[step] for step in range(7, 12)} and len(set(whole.values())) == 12


def test_the_cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert cache.cache_folder("") == f"{tmp_path}/megabyte_jax"
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert cache.cache_folder("") == os.path.expanduser("~/.cache/megabyte_jax")
  assert cache.cache_folder("~/x") == os.path.expanduser("~/x")


@pytest.mark.parametrize("name", ["a.lzma", "a.txt.7z", "a.lz4", "a.Z", "a.txt.gz.gz", "a.jsonl.xz.zst"])
def test_compression_that_is_not_read_is_no_text(tmp_path, data, name):
  (tmp_path / name).write_bytes(b"noise")
  (tmp_path / "b.txt.gz").write_bytes(COMPRESS[".gz"](b"text"))
  how = "twice" if name.count(".") == 3 else "in a way that is not read"
  for spec in (tmp_path, tmp_path / name):
    with pytest.raises(DataError, match=rf"{name} is compressed {how}; decompress it first"):
      open_path(str(spec), data)
  source = open_path(str(tmp_path), dataclasses.replace(data, skip_bad=True))
  assert read_all(source) == [b"text"] and source.skipped == 1
  with pytest.raises(DataError, match=f"is compressed {how}"):
    pack(str(tmp_path), str(tmp_path.parent / f"{tmp_path.name}-packed"), data)
  assert read_all(open_path(str(tmp_path / name), dataclasses.replace(data, raw=True))) == [b"noise"]


def test_a_name_that_is_an_ending_alone(tmp_path, data):
  (tmp_path / ".gz").write_bytes(COMPRESS[".gz"](b"text"))
  assert read_all(open_path(f"{tmp_path}/.gz", data)) == [b"text"]
