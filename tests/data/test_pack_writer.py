"""Packing that is killed at any point, done twice at once, or has no room: never a folder that is not what it says."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tfds_copies
from packed_folders import NO_ROOM
from tfrecord_files import as_tfrecords

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.packing import pack_writer, packed_folder
from megabyte_jax.data.packing.pack_writer import PackWriter
from megabyte_jax.errors import ConfigError, DataError

PLAIN = DataConfig()
DOCUMENTS = [(f"{i}", np.random.default_rng(i).bytes(300)) for i in range(6)]
REQUEST = {"settings": {"form": "bytes"}, "source": "x", "fingerprint": "abc|def"}


class Killed(BaseException):
  """Nothing catches it."""


def write(folder, request=REQUEST, stop=None):
  writer = PackWriter(str(folder), request)

  def items():
    for i, (name, data) in list(enumerate(DOCUMENTS))[writer.items_done :]:
      if i == stop:
        raise Killed
      yield name, iter([data])

  writer.write(items())


def contents(folder):
  source = open_path(str(folder), PLAIN)
  pairs = zip(source.names, source.lengths, strict=True)
  return {name: source.read(i, 0, int(n)).tobytes() for i, (name, n) in enumerate(pairs)}


@pytest.mark.parametrize("function", ["unlink", "rename", "replace", "fsync"])
def test_killed_at_any_step_it_is_finished_by_the_same_command(tmp_path, monkeypatch, function):
  monkeypatch.setattr(pack_writer, "_SAVE_EVERY", 700)
  for number in range(60):
    folder, calls = tmp_path / f"{number}", iter(range(number))
    with monkeypatch.context() as patch:
      real = getattr(os, function)

      def counted(*args, real=real, calls=calls, **more):
        if next(calls, None) is None:
          raise Killed
        return real(*args, **more)

      patch.setattr(os, function, counted)
      try:
        write(folder)
        return
      except Killed:
        pass
      finally:
        assert not folder.exists() or contents(folder) == dict(DOCUMENTS)
    write(folder)
    assert contents(folder) == dict(DOCUMENTS)
    packed_folder.verify(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["data.bin", "ends.npy", "manifest.json", "names.txt"]
  raise AssertionError(f"os.{function} was called 60 times")


@pytest.mark.parametrize("name", ["data.bin", "ends", "names.txt"])
def test_a_part_shorter_than_it_says_is_begun_anew(tmp_path, monkeypatch, name):
  monkeypatch.setattr(pack_writer, "_SAVE_EVERY", 700)
  with pytest.raises(Killed):
    write(tmp_path / "p", stop=4)
  assert PackWriter(str(tmp_path / "p"), REQUEST).items_done == 3
  os.truncate(tmp_path / "p.part" / name, 5)
  assert PackWriter(str(tmp_path / "p"), REQUEST).items_done == 0
  write(tmp_path / "p")
  assert contents(tmp_path / "p") == dict(DOCUMENTS)


def test_two_at_once_do_not_meet(tmp_path):
  (tmp_path / "p.part").mkdir()
  other = os.open(tmp_path / "p.part", os.O_RDONLY)
  fcntl.flock(other, fcntl.LOCK_EX)
  with pytest.raises(DataError, match=r"another process is writing .*p\.part; wait"):
    write(tmp_path / "p")
  os.close(other)
  late = PackWriter(str(tmp_path / "p"), REQUEST)
  write(tmp_path / "p")
  with pytest.raises(DataError, match="run the same command once more"):
    late.write(iter([("0", iter([b"other"]))]))
  assert contents(tmp_path / "p") == dict(DOCUMENTS)


def test_folders_that_are_not_complete_are_no_documents(tmp_path):
  with pytest.raises(Killed):
    write(tmp_path / "p", stop=4)
  with pytest.raises(DataError, match=r"p\.part is packed data that are not complete"):
    open_path(str(tmp_path / "p.part"), PLAIN)
  write(tmp_path / "p")
  (tmp_path / "p" / "names.txt").unlink()
  with pytest.raises(DataError, match=r"names\.txt cannot be read"):
    open_path(str(tmp_path / "p"), PLAIN).names  # noqa: B018
  with pytest.raises(DataError, match=r"names\.txt cannot be read"):
    prepare.main(["verify", str(tmp_path / "p")])
  (tmp_path / "p" / "names.txt").write_text("one\n")
  with pytest.raises(DataError, match="1 names for 6 documents"):
    open_path(str(tmp_path / "p"), PLAIN).names  # noqa: B018
  (tmp_path / "p" / "manifest.json").unlink()
  with pytest.raises(DataError, match=r"not complete .manifest\.json is missing"):
    open_path(str(tmp_path / "p"), PLAIN)
  with pytest.raises(DataError, match="holds other data"):
    write(tmp_path / "p")


def test_the_manifest_tells_changed_data_apart(tmp_path):
  """Blocks are not looked at everywhere in a large file, but its checksum in the manifest is."""
  write(tmp_path / "p")
  before = open_path(str(tmp_path / "p"), PLAIN).fingerprint
  manifest = tmp_path / "p" / "manifest.json"
  values = json.loads(manifest.read_text())
  values["sha256"]["data.bin"] = "0" * 64
  manifest.write_text(json.dumps(values))
  after = open_path(str(tmp_path / "p"), PLAIN).fingerprint
  assert before != after


def test_a_target_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_bytes(b"x")
  with pytest.raises(ConfigError, match=r"file/p: .*/file is a file, not a folder; choose another FOLDER"):
    prepare.main(["pack", str(tmp_path / "file"), str(tmp_path / "file" / "p")])


def test_ctrl_c_is_one_line_and_130(tmp_path):
  (tmp_path / "x").write_bytes(b"text")
  program = """
import signal, sys
from megabyte_jax.commands import command_line
from megabyte_jax.commands import prepare
from megabyte_jax.data.packing.pack_writer import PackWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
PackWriter._finish = lambda *_: signal.raise_signal(signal.SIGINT)
command_line.run(lambda: prepare.main(sys.argv[1:]))
"""
  arguments = ["pack", str(tmp_path / "x"), str(tmp_path / "p")]
  result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
  assert result.returncode == 130 and "Traceback" not in result.stderr
  assert result.stderr.endswith("the same command goes on from here\ninterrupted\n")
  assert not (tmp_path / "p").exists()
  prepare.main(arguments)
  assert contents(tmp_path / "p") == {"x": b"text"}


def test_a_full_disk_in_a_conversion_is_one_line(tmp_path):
  folder = as_tfrecords(tfds_copies.downsampled_imagenet(tmp_path))
  arguments = ["convert", "tfds:downsampled_imagenet/64x64", f"--tfds_dir={tmp_path}"]
  code = NO_ROOM.replace('["pack", *sys.argv[2:]]', "sys.argv[2:]")
  result = subprocess.run(
    [sys.executable, "-c", code, "20000", *arguments], capture_output=True, text=True, check=False
  )
  assert result.returncode == 1 and "is there room on the disk" in result.stderr, result.stderr
  assert "Traceback" not in result.stderr and not list(folder.glob("*array_record*")) + list(folder.glob(".*tmp"))
  prepare.main(arguments)
  spec = "tfds:downsampled_imagenet/64x64:validation"
  assert len(open_path(spec, DataConfig(form="image", tfds_dir=str(tmp_path))).names) == 4
  assert pathlib.Path(folder).is_dir()
