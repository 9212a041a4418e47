"""Archives with what is rare in them: several streams, several archives in one file, hard links, bad members."""

import bz2
import gzip
import io
import lzma
import pathlib
import tarfile
import zipfile

import numpy as np
import pytest

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.packing import archives
from megabyte_jax.errors import DataError

TEXT = np.random.default_rng(0).bytes(3000)


def pack(*arguments):
  prepare.main(["pack", *map(str, arguments)])


def packed(folder):
  source = open_path(str(folder), DataConfig())
  pairs = zip(source.names, source.lengths, strict=True)
  return {name: source.read(i, 0, int(n)).tobytes() for i, (name, n) in enumerate(pairs)}


def tar(**contents):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as archive:
    for name, data in contents.items():
      info = tarfile.TarInfo(name)
      if isinstance(data, str):  # a hard link
        info.type, info.linkname = tarfile.LNKTYPE, data
        archive.addfile(info)
      else:
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
  return file.getvalue()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_every_stream_of_a_file_is_read(tmp_path, kind):
  compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
  first, second = compress(TEXT[:1000]), compress(TEXT[1000:])
  path = tmp_path / f"x.{kind}"
  padding = bytes(8) if kind in ("gz", "xz") else b""
  path.write_bytes(first + padding + second + padding)
  pack(path, tmp_path / "whole")
  assert packed(tmp_path / "whole") == {"x": TEXT}
  for i, rest in enumerate((b"X" + second[1:], second[:3] + b"\xff" + second[4:], second[:-1], b"garbage")):
    path.write_bytes(first + rest)
    with pytest.raises(DataError, match="damaged or cut short"):
      pack(path, tmp_path / f"bad{i}")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2"])
def test_archives_one_after_the_other_are_all_read(tmp_path, kind):
  compress = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress}[kind]
  path = tmp_path / f"x.{kind}"
  parts = [tar(a=TEXT[:700], b=TEXT[700:1500]), tar(c=TEXT[1500:]), tar(d=b"last")]
  path.write_bytes(compress(b"".join(parts)))
  pack(path, tmp_path / "whole")
  assert packed(tmp_path / "whole") == {"a": TEXT[:700], "b": TEXT[700:1500], "c": TEXT[1500:], "d": b"last"}
  path.write_bytes(compress(parts[0] + b"X" + parts[1]))
  with pytest.raises(DataError, match="damaged or cut short"):
    pack(path, tmp_path / "bad")


def test_a_hard_link_is_the_file_it_links_to(tmp_path):
  (tmp_path / "x.tar").write_bytes(tar(a=TEXT, b="a", c=b"other", d="c"))
  pack(tmp_path / "x.tar", tmp_path / "whole")
  assert packed(tmp_path / "whole") == {"a": TEXT, "b": TEXT, "c": b"other", "d": b"other"}
  (tmp_path / "x.tar").write_bytes(tar(a=TEXT, b="nothing"))
  with pytest.raises(DataError, match=r"at b .it is a link to nothing, which is not in the archive"):
    pack(tmp_path / "x.tar", tmp_path / "bad")


def test_links_to_links_and_to_the_newest_file_of_a_name(tmp_path):
  parts = tar(a=b"old", b="a", c="b"), tar(a=b"new", d="a", e="c")
  (tmp_path / "x.tar").write_bytes(b"".join(parts))
  pack(tmp_path / "x.tar", tmp_path / "whole")
  source = open_path(str(tmp_path / "whole"), DataConfig())
  assert [source.read(i, 0, 3).tobytes() for i in range(6)] == [b"old"] * 3 + [b"new"] * 2 + [b"old"]


def test_many_hard_links_take_two_more_passes(tmp_path, monkeypatch):
  path = tmp_path / "x.tar.gz"
  path.write_bytes(gzip.compress(tar(a=TEXT, b=b"other", **{f"link{i}": "ab"[i % 2] for i in range(300)})))
  headers = []
  read = tarfile.TarInfo.fromtarfile.__func__
  counting = classmethod(lambda cls, archive: headers.append(1) or read(cls, archive))
  monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", counting)
  monkeypatch.setattr(archives, "_SPOOL", 10)  # so that the copies lie in a file
  found = [(name, b"".join(blocks)) for name, blocks in archives.documents(str(path))]
  assert found == [("a", TEXT), ("b", b"other"), *((f"link{i}", (TEXT, b"other")[i % 2]) for i in range(300))]
  assert len(headers) == 3 * 303  # and each pass reads the end mark


def test_a_bad_member_of_a_zip_file_is_named_or_skipped(tmp_path):
  path = tmp_path / "x.zip"
  with zipfile.ZipFile(path, "w") as archive:
    for i in range(3):
      archive.writestr(f"{i}.txt", TEXT[1000 * i : 1000 * i + 1000])
  data = bytearray(path.read_bytes())
  data[data.find(TEXT[1000:1040])] ^= 1
  path.write_bytes(data)
  with pytest.raises(DataError, match=r"1\.txt .*CRC"):
    pack(path, tmp_path / "p")
  pack(path, tmp_path / "p", "--skip-bad")
  assert packed(tmp_path / "p") == {"0.txt": TEXT[:1000], "2.txt": TEXT[2000:]}
  assert open_path(str(tmp_path / "p"), DataConfig()).skipped == 1


def test_an_empty_gz_file_is_named_or_skipped(tmp_path):
  path = tmp_path / "x.txt.gz"
  path.write_bytes(gzip.compress(b""))
  with pytest.raises(DataError, match=r"x\.txt is empty; skip"):
    pack(path, tmp_path / "p")
  with pytest.raises(DataError, match=r"nothing to pack into .*1 items were skipped"):
    pack(path, tmp_path / "p", "--skip-bad")


def test_the_place_in_an_archive_is_told(tmp_path):
  path = pathlib.Path(tmp_path / "x.tar.gz")
  path.write_bytes(gzip.compress(tar(**{str(i): np.random.default_rng(i).bytes(1 << 20) for i in range(4)})))
  places = []
  for _, blocks in archives.documents(str(path), on_place=places.append):
    list(blocks)
  assert places == sorted(places) and len(set(places)) > 3 and places[-1] <= path.stat().st_size
