"""Names of sources: commas, brackets, spaces, bytes that are not text, pipes; and what is noticed about files."""

import gzip
import logging
import os
import subprocess
import sys
import threading

import pytest

from megabyte_jax.config import DataConfig
from megabyte_jax.data import pipes
from megabyte_jax.data.open_data import open_path, open_source
from megabyte_jax.data.source_names import split_field, split_list
from megabyte_jax.errors import ConfigError, DataError

PLAIN = DataConfig()


def read_all(source):
  return [source.read(i, 0, int(length)).tobytes() for i, length in enumerate(source.lengths)]


def test_lists_and_escapes(tmp_path):
  assert split_list("a, b ,c") == ["a", "b", "c"]
  assert split_list(r"a\,b,c\,d\,e") == ["a,b", "c,d,e"]
  assert split_list(r"C\new,b") == [r"C\new", "b"]
  for spec in ("a,,b", ",", "a,"):
    with pytest.raises(ConfigError, match="has an empty entry"):
      split_list(spec)
  assert split_field("a.jsonl#text") == ("a.jsonl", "text") and split_field("a#b/c.jsonl") == ("a#b/c.jsonl", "")


ODD = ["a,b", "a [1]", "*?", " spaces ", "#hash", os.fsdecode(b"caf\xe9"), "ünï", "quote'\"", "back\\slash"]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_files_and_folders(tmp_path, name):
  (tmp_path / name).mkdir()
  (tmp_path / name / f"{name}.txt").write_bytes(b"inside")
  (tmp_path / "plain").write_bytes(b"plain")
  for spec in (f"{tmp_path}/{name}", f"{tmp_path}/{name}/{name}.txt"):
    assert read_all(open_path(spec, PLAIN)) == [b"inside"]
    escaped = spec.replace(",", r"\,")
    both = open_path(f"{escaped},{tmp_path}/plain", PLAIN)
    assert read_all(both) == [b"inside", b"plain"] and both.fingerprint
    config = DataConfig(train=f"{escaped},{tmp_path}/plain", train_weights=(1.0, 2.0))
    assert read_all(open_source(config, "train")) == [b"inside", b"plain"]


def test_brackets_in_a_glob_are_written_as_globs_have_them(tmp_path):
  (tmp_path / "a[1]").mkdir()
  (tmp_path / "a[1]" / "x.txt").write_bytes(b"inside")
  assert read_all(open_path(f"{tmp_path}/a[[]1]/*.txt", PLAIN)) == [b"inside"]


READ = """
import sys
from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
source = [open_path(sys.argv[1], DataConfig()) for _ in range(2)][1]  # the second time it is remembered
print(source.read(0, 0, int(source.lengths[0])))
"""


def test_pipes_are_read_once():
  command = f"{sys.executable} -c '{READ}' <(printf abc); printf de | {sys.executable} -c '{READ}' /dev/stdin"
  result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
  assert result.stdout == "[97 98 99]\n[100 101]\n", result.stderr


def through_pipe(tmp_path, name, data):
  path = tmp_path / name
  os.mkfifo(path)
  threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()
  return str(path)


def test_what_cannot_be_read_from_a_pipe_is_one_line(tmp_path, monkeypatch):
  with pytest.raises(DataError, match="is a pipe through which nothing came"):
    open_path(through_pipe(tmp_path, "empty", b""), PLAIN)
  monkeypatch.setattr(pipes, "_MOST", 10)
  with pytest.raises(DataError, match="is a pipe of more than 10 bytes; write them to a file"):
    open_path(through_pipe(tmp_path, "long", b"x" * 11), PLAIN)
  with pytest.raises(ConfigError, match="is a pipe, which is read as bytes"):
    open_path(through_pipe(tmp_path, "image", b"x"), DataConfig(form="image"))
  for device in ("/dev/null", "/dev/zero"):
    with pytest.raises(DataError, match=f"{device} is a terminal or a device; name a file"):
      open_path(device, PLAIN)
  named = open_path(f"{tmp_path}/plain,{through_pipe(tmp_path, 'more', b'abc')}", PLAIN) if write(tmp_path) else None
  assert read_all(named) == [b"plain", b"abc"]


def write(tmp_path):
  return (tmp_path / "plain").write_bytes(b"plain")


def test_utf16_is_noticed_once(tmp_path, caplog):
  (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
  (tmp_path / "b.txt").write_bytes(b"text")
  for spec in (f"{tmp_path}/b.txt", f"{tmp_path}", f"{tmp_path}/a.txt"):
    assert b"text" in read_all(open_path(spec, PLAIN))[-1] or spec.endswith("a.txt")
  found = [record for record in caplog.records if record.levelno == logging.WARNING]
  assert len(found) == 1 and "a.txt begins with the byte-order mark of UTF-16" in found[0].getMessage()


def test_a_file_written_to_while_it_is_read_is_said_once(tmp_path, caplog):
  path = tmp_path / "a.txt"
  path.write_bytes(b"before")
  source = open_path(str(path), PLAIN)
  read_all(source)
  assert not caplog.records
  path.write_bytes(b"behind")
  os.utime(path, ns=(1, 1))
  assert read_all(source) == [b"behind"] and read_all(source) == [b"behind"]
  assert ["a.txt has been written to since it was opened" in record.getMessage() for record in caplog.records] == [True]


def test_compressed_bytes_through_a_pipe_are_what_comes(tmp_path):
  data = gzip.compress(b"text")
  assert read_all(open_path(through_pipe(tmp_path, "x", data), PLAIN)) == [data]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="a file of Linux")
def test_a_file_without_a_size_is_not_called_empty():
  for raw in (False, True):
    with pytest.raises(DataError, match=r"/proc/self/status has no size, though it holds bytes, .*: copy it, and name"):
      open_path("/proc/self/status", DataConfig(raw=raw))
