"""A pack that was interrupted, killed or ran out of room goes on, and nothing looks whole that is not."""

import bz2
import gzip
import io
import json
import lzma
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from packed_folders import NO_ROOM, PLAIN, contents, pack
from PIL import Image

from megabyte_jax.config import DataConfig
from megabyte_jax.data.media.image_source import Images
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.packing import pack_writer
from megabyte_jax.errors import DataError


class Stop(Exception):
  pass


def interrupted(monkeypatch, stop, *arguments):
  """Packs, and raises Stop instead of item number `stop`."""
  write_items = pack_writer.PackWriter._write_items

  def until(items):
    for i, item in enumerate(items):
      if i == stop:
        raise Stop
      yield item

  with monkeypatch.context() as patch:
    patch.setattr(
      pack_writer.PackWriter, "_write_items", lambda self, items, show: write_items(self, until(items), show)
    )
    pack(*arguments)


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


def write_images(folder, *sides):
  """PNG images of one colour each, of so many pixels."""
  folder.mkdir()
  for i, side in enumerate(sides):
    Image.new("RGB", (side, side), (i, i, i)).save(folder / f"{i}.png")
  return folder


def test_a_pack_of_other_images_begins_anew(tmp_path, monkeypatch):
  monkeypatch.setattr(pack_writer, "_SAVE_EVERY", 1)
  flags = "--form=image", "--image-size=4", "--scan=raster"
  folder = write_images(tmp_path / "images", 20, 5, 5, 5)
  with pytest.raises(Stop):
    interrupted(monkeypatch, 2, folder, tmp_path / "packed", *flags, "--skip-bad", "--max-pixels=100")
  pack(folder, tmp_path / "packed", *flags, "--skip-bad", "--max-pixels=1000")
  data = DataConfig(form="image", image_size=4, scan="raster")
  expected = {f"{i}.png": bytes([i]) * 48 for i in range(4)}
  assert contents(open_path(str(tmp_path / "packed"), data)) == expected
  # Without --skip-bad a larger limit lets the same images be read: no work is lost.
  folder = write_images(tmp_path / "more", 5, 5, 20)
  with pytest.raises(DataError, match="too large"):
    pack(folder, tmp_path / "again", *flags, "--max-pixels=100")
  opened = []
  read = Images._open
  monkeypatch.setattr(Images, "_open", lambda self, i: opened.append(i) or read(self, i))
  pack(folder, tmp_path / "again", *flags, "--max-pixels=1000")
  assert opened == [2]


def test_what_was_left_out_before_belongs_to_a_pack(tmp_path, monkeypatch):
  monkeypatch.setattr(pack_writer, "_SAVE_EVERY", 1)
  folder = write_images(tmp_path / "images", 5, 5, 5)
  flags = "--form=image", "--image-size=4", "--scan=raster", "--skip-bad"
  is_good = Images._is_good
  with monkeypatch.context() as patch, pytest.raises(Stop):
    patch.setattr(Images, "_is_good", lambda self, i: i > 0 and is_good(self, i))  # as where a disk fails for once
    interrupted(monkeypatch, 1, folder, tmp_path / "packed", *flags)
  pack(folder, tmp_path / "packed", *flags)
  found = open_path(str(tmp_path / "packed"), DataConfig(form="image", image_size=4, scan="raster"))
  assert contents(found) == {f"{i}.png": bytes([i]) * 48 for i in range(3)} and found.skipped == 0


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


@pytest.mark.parametrize("tar_first", [True, False])
def test_archives_beside_other_sources_go_on_after_every_document(tmp_path, monkeypatch, tar_first):
  monkeypatch.setattr(pack_writer, "_SAVE_EVERY", 1)
  for name in ("plain", "archived"):
    (tmp_path / name).mkdir()
    for i in range(4):
      (tmp_path / name / f"{name}{i}.txt").write_bytes(f"{name} {i} ".encode() * (i + 1))
  with tarfile.open(tmp_path / "b.tar", "w") as archive:
    for path in sorted((tmp_path / "archived").iterdir()):
      archive.add(path, arcname=path.name)
  parts = [f"{tmp_path}/b.tar", f"{tmp_path}/plain/"]
  spec = ",".join(parts if tar_first else parts[::-1])
  expected = {path.name: path.read_bytes() for path in tmp_path.glob("*/*.txt")}
  for stop in range(1, len(expected)):
    with pytest.raises(Stop):
      interrupted(monkeypatch, stop, spec, tmp_path / f"packed{stop}")
    pack(spec, tmp_path / f"packed{stop}")
    assert contents(open_path(str(tmp_path / f"packed{stop}"), PLAIN)) == expected


def damaged_archive(kind):
  """A tar archive of three files, the second damaged inside, and of links to them."""
  file = io.BytesIO()
  rng = np.random.default_rng(0)
  with tarfile.open(fileobj=file, mode="w") as archive:
    for name in ("a", "link", "b", "c", "nothing"):
      info = tarfile.TarInfo(name)
      if name in ("link", "nothing"):
        info.type, info.linkname = tarfile.LNKTYPE, {"link": "a", "nothing": "missing"}[name]
        archive.addfile(info)
      else:
        info.size = 60_000
        archive.addfile(info, io.BytesIO(rng.bytes(info.size)))
  if kind == "tar":
    return file.getvalue()[:90_000]
  whole = bytearray({"tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}[kind](file.getvalue()))
  whole[len(whole) // 2] ^= 255
  return bytes(whole)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_damaged_archive_holds_no_document_twice_when_it_goes_on(tmp_path, monkeypatch, kind):
  monkeypatch.setattr(pack_writer, "_SAVE_EVERY", 1)
  folder = tmp_path / "set"
  folder.mkdir()
  (folder / f"1.{kind}").write_bytes(damaged_archive(kind))
  for name in "23":
    (folder / f"{name}.txt").write_text(name)
  pack(folder, tmp_path / "at_once", "--skip-bad")
  expected = open_path(str(tmp_path / "at_once"), PLAIN)
  assert expected.skipped and list(expected.names)[-2:] == ["2.txt", "3.txt"]
  for stop in range(1, len(expected.names) + expected.skipped):
    with pytest.raises(Stop):
      interrupted(monkeypatch, stop, folder, tmp_path / f"packed{stop}", "--skip-bad")
    pack(folder, tmp_path / f"packed{stop}", "--skip-bad")
    found = open_path(str(tmp_path / f"packed{stop}"), PLAIN)
    assert (list(found.names), found.skipped) == (list(expected.names), expected.skipped)
    assert contents(found) == contents(expected)


def test_a_link_to_nothing_costs_no_files_after_it(tmp_path):
  with tarfile.open(tmp_path / "x.tar", "w") as archive:
    link, file = tarfile.TarInfo("link"), tarfile.TarInfo("after")
    link.type, link.linkname, file.size = tarfile.LNKTYPE, "missing", 4
    archive.addfile(link)
    archive.addfile(file, io.BytesIO(b"text"))
  pack(tmp_path / "x.tar", tmp_path / "packed", "--skip-bad")
  assert contents(open_path(str(tmp_path / "packed"), PLAIN)) == {"after": b"text"}


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


def test_a_full_disk_is_one_clear_error_and_no_loss(tmp_path):
  (tmp_path / "x").write_bytes(np.random.default_rng(0).bytes(3_000_000))
  command = [sys.executable, "-c", NO_ROOM, "1000000", str(tmp_path / "x"), str(tmp_path / "p")]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode == 1 and "no room for more" in result.stderr and "Traceback" not in result.stderr
  assert not (tmp_path / "p").exists()
  pack(tmp_path / "x", tmp_path / "p")
  assert contents(open_path(str(tmp_path / "p"), PLAIN)) == {"x": (tmp_path / "x").read_bytes()}
