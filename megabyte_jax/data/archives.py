"""Archives of text files, read from front to back: zip, tar (also gz, bz2, xz) and single gz, bz2, xz files."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from megabyte_jax.data.files import fingerprint_files, sizes_of
from megabyte_jax.data.sources import DataError

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_SINGLE = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BLOCK = 1 << 22
_ERRORS = (
  OSError,
  EOFError,
  zlib.error,
  lzma.LZMAError,
  tarfile.TarError,
  zipfile.BadZipFile,
  RuntimeError,
  ValueError,
)


def is_archive(spec: str) -> bool:
  """Whether a name ends like that of an archive and is a local file."""
  return spec.lower().endswith((".zip", *_TAR, *_SINGLE)) and os.path.isfile(spec)


def fingerprint(path: str) -> str:
  """Changes with the archive; see `fingerprint_files`."""
  return fingerprint_files([path], [os.path.basename(path)], sizes_of([path]))


def documents(path: str, first: int = 0, skip_bad: bool = False) -> Iterator[tuple[str, Iterator[bytes]] | None]:
  """(name, blocks of bytes) of the files in an archive from number `first` on; None for an empty one to be skipped.

  Hidden files are left out.

  Raises:
    DataError: the archive is damaged or cut short; or, without `skip_bad`, a file in it is empty.
  """
  name = path
  try:
    number = 0
    for name, size, file in _members(path):
      number += 1
      if number <= first:
        continue
      if size == 0 and not skip_bad:
        raise DataError(f"{name} in {path} is empty; skip such files with --skip_bad")
      yield None if size == 0 else (name, _blocks(file, name, path))
  except _ERRORS as error:
    if isinstance(error, DataError):
      raise
    raise DataError(f"{path} is damaged or cut short at {name} ({error})") from error


def _members(path: str) -> Iterator[tuple[str, int, IO[bytes]]]:
  """(name, bytes or -1 where they are not known, open file)."""
  lower = path.lower()
  if lower.endswith(".zip"):
    with zipfile.ZipFile(path) as archive:
      _check_count(path, len(archive.infolist()))
      for entry in archive.infolist():
        with archive.open(entry) as file:  # also of those left out: it compares the name with the one at the file
          if not entry.is_dir() and not _hidden(entry.filename):
            yield entry.filename, entry.file_size, file
  elif lower.endswith(_TAR):
    with _open_tar(lower)(path, "rb") as file:
      watched = _Watched(file)
      with tarfile.open(fileobj=watched, mode="r|") as archive:
        for member in archive:
          if member.isfile() and not _hidden(member.name):
            yield member.name, member.size, archive.extractfile(member)
      watched.check_end()
  else:
    stem, suffix = os.path.splitext(os.path.basename(path))
    with _SINGLE[suffix.lower()](path, "rb") as file:
      yield stem, -1, file


def _check_count(path: str, found: int) -> None:
  """Raises ValueError unless a zip file's directory has entries, as many as its end says; zipfile does not look."""
  with open(path, "rb") as file:
    file.seek(max(0, os.path.getsize(path) - 22 - 65535))
    tail = file.read()
  place = tail.rfind(b"PK\5\6")
  promised = int.from_bytes(tail[place + 10 : place + 12], "little")
  if not found or promised not in (found, 0xFFFF):  # 0xFFFF: in the zip64 record
    raise ValueError(f"{found} of {promised} entries are in its directory")


def _open_tar(name: str) -> Callable[..., Any]:
  return next((opener for suffix, opener in _SINGLE.items() if name.endswith((suffix, f".t{suffix[1:]}"))), open)


class _Watched:
  """A stream that knows how it ended: tarfile takes an archive cut between files, or mid-stream, for a whole one."""

  def __init__(self, file: IO[bytes]):
    self._file, self._tail = file, b""

  def read(self, size: int) -> bytes:
    block = self._file.read(size)
    self._tail = (self._tail + block)[-1024:]
    return block

  def check_end(self) -> None:
    """Reads on to the end; raises ValueError unless two blocks of zeros are there, as every archive has them."""
    while self.read(_BLOCK):
      pass
    if self._tail != bytes(1024):
      raise ValueError("no end-of-archive mark")


def _hidden(name: str) -> bool:
  return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _blocks(file: IO[bytes], name: str, path: str) -> Iterator[bytes]:
  try:
    while block := file.read(_BLOCK):
      yield block
  except _ERRORS as error:
    raise DataError(f"{path} is damaged or cut short at {name} ({error})") from error
