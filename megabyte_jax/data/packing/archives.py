"""Reads archives of text files from front to back: zip, tar (also gz, bz2, xz, zst) and single compressed files.

Every regular file is read that is not hidden, a hard link as the file that it links to. Symbolic links are left out.
"""

from __future__ import annotations

import functools
import lzma
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Protocol

from megabyte_jax.data.folders import ARRAYS_HINT
from megabyte_jax.data.records.contents import OPENERS
from megabyte_jax.data.records.file_types import holds_arrays
from megabyte_jax.errors import DataError

_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_BLOCK = 1 << 22
_SPOOL = 1 << 26  # bytes of files with hard links that are kept in memory, not in a temporary file
_RECORD = 512  # bytes; a tar archive consists of such
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

Item = tuple[str, Iterator[bytes]] | None  # name and blocks of a document; None: left out, and counted


class BadItem(DataError):
  """A file in an archive that cannot be read, while those after it can."""


def is_archive(spec: str) -> bool:
  """Returns True if a name ends like that of an archive and is a local file."""
  return spec.lower().endswith((".zip", *_TAR, *OPENERS)) and os.path.isfile(spec)


def documents(
  path: str, skip_bad: bool = False, on_place: Callable[[int], None] = lambda place: None
) -> Iterator[Item]:
  """Yields (name, blocks of bytes) of an archive's files; None for an empty one to be skipped.

  Hidden files are left out.

  Args:
    path: of the archive.
    skip_bad: take empty files, and files of arrays, for ones to be skipped.
    on_place: called now and then with the byte of the archive that has been reached.

  Raises:
    DataError: the archive is damaged or cut short; or, without `skip_bad`, a file in it is empty or holds arrays.
    BadItem: while blocks are read: that file is damaged, which is not a hindrance to the next.
  """
  name = path
  try:
    with open(path, "rb") as archive:
      for name, size, opened in _members(path, archive):
        on_place(archive.tell())
        arrays = f"holds arrays, not text; unpack it: {ARRAYS_HINT}" if holds_arrays(name) else ""
        odd = "is empty" if size == 0 else arrays
        if odd and not skip_bad:
          raise DataError(f"{name} in {path} {odd}; skip such files with --skip-bad")
        yield None if odd else (name, _blocks(opened, name, path, lambda: on_place(archive.tell())))
  except _ERRORS as error:
    if isinstance(error, DataError):
      raise
    raise DataError(f"{path} is damaged or cut short at {name} ({error})") from error


class _Readable(Protocol):
  def read(self, size: int, /) -> bytes: ...


Opened = Callable[[], _Readable]


def _members(path: str, file: IO[bytes]) -> Iterator[tuple[str, int, Opened]]:
  """(name, bytes or -1 where they are not known, what opens it)."""
  lower = path.lower()
  if lower.endswith(".zip"):
    yield from _zip_members(path, file)
  elif lower.endswith(_TAR):
    links, count = _Links(path), 0
    for member, opened in _tar_members(path, file):
      if member.isfile() and not _hidden(member.name):
        yield member.name, member.size, opened
      elif member.islnk():
        if not _hidden(member.name):
          yield member.name, -1, functools.partial(links.open, count, member.linkname)
        count += 1
  else:
    stem, suffix = os.path.splitext(os.path.basename(path))
    stream = OPENERS[suffix.lower()](file)
    yield stem, -1, lambda: stream


def _zip_members(path: str, file: IO[bytes]) -> Iterator[tuple[str, int, Opened]]:
  with zipfile.ZipFile(file) as archive:
    _check_count(path, len(archive.infolist()))
    for entry in archive.infolist():
      if entry.is_dir() or _hidden(entry.filename):
        archive.open(entry).close()  # compares the name with the one at the file: it may be left out by damage
      else:
        yield entry.filename, entry.file_size, functools.partial(archive.open, entry)


def _check_count(path: str, found: int) -> None:
  """Raises ValueError unless a zip file's directory has entries, as many as its end says; zipfile does not look."""
  with open(path, "rb") as file:
    file.seek(max(0, os.path.getsize(path) - 22 - 65535))
    tail = file.read()
  place = tail.rfind(b"PK\5\6")
  promised = int.from_bytes(tail[place + 10 : place + 12], "little")
  if not found or promised not in (found, 0xFFFF):  # 0xFFFF: in the zip64 record
    raise ValueError(f"{found} of {promised} entries are in its directory")


def _open_tar(path: str, file: IO[bytes]) -> _Readable:
  lower = path.lower()
  return next((opener(file) for suffix, opener in OPENERS.items() if lower.endswith((suffix, f".t{suffix[1:]}"))), file)


def _tar_members(path: str, file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, Opened]]:
  """All members of an archive, or of several one after the other (as `cat` and tar's own appending leave them)."""
  stream = _Watched(_open_tar(path, file))
  block = stream.read(_RECORD)
  while block:
    stream.put_back(block)
    # Reads of one record: so it stops where an archive ends, and does not take the beginning of the next one along.
    # Typeshed wants a whole file, of which tarfile needs no more than read().
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_RECORD) as archive:  # type: ignore[call-overload]
      for member in archive:
        yield member, functools.partial(_extracted, archive, member)
    block = bytes(_RECORD)
    while block == bytes(_RECORD):
      block = stream.read(_RECORD)
  stream.check_end()


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
  file = archive.extractfile(member)
  if file is None:
    raise ValueError(f"{member.name} is not a regular file")
  return file


class _Links:
  """Finds what the hard links of a tar archive lead to, in two passes over it however many links there are.

  A link leads to the last file of that name before it, or to what a link of that name leads to.
  """

  def __init__(self, path: str):
    self._path = path
    self._targets: list[int | None] = []  # of each link, the place of its file among all members
    self._copied: dict[int, tuple[int, int]] = {}  # member -> first and last byte of its copy
    self._damage: Exception | None = None

  def open(self, number: int, name: str) -> _Readable:
    """Opens what link number `number`, to `name`, leads to.

    Raises:
      ValueError: that is not in the archive.
      Exception: one of `_ERRORS`, for every link, where the archive is damaged.
    """
    if self._damage:
      raise self._damage
    if not self._targets:
      try:
        self._find_targets()
        self._copy_targets()
      except _ERRORS as error:
        self._damage = error
        raise
    target = self._targets[number]
    if target is None:
      raise ValueError(f"it is a link to {name}, which is not in the archive")
    return _Part(self._copies, *self._copied[target])

  def _find_targets(self) -> None:
    newest: dict[str, int | None] = {}
    with open(self._path, "rb") as file:
      for i, (member, _) in enumerate(_tar_members(self._path, file)):
        if member.isfile():
          newest[member.name] = i
        elif member.islnk():
          newest[member.name] = newest.get(member.linkname)
          self._targets.append(newest[member.name])

  def _copy_targets(self) -> None:
    self._copies = tempfile.SpooledTemporaryFile(_SPOOL)  # noqa: SIM115  (closed with the last reference)
    wanted = set(self._targets)
    with open(self._path, "rb") as file:
      for i, (_, opened) in enumerate(_tar_members(self._path, file)):
        if i in wanted:
          start = self._copies.tell()
          file_in_tar = opened()
          while block := file_in_tar.read(_BLOCK):
            self._copies.write(block)
          self._copied[i] = start, self._copies.tell()


class _Part:
  """The bytes from one place of a file to another."""

  def __init__(self, file: IO[bytes], start: int, stop: int):
    self._file, self._at, self._stop = file, start, stop

  def read(self, size: int) -> bytes:
    self._file.seek(self._at)
    block = self._file.read(min(size, self._stop - self._at))
    self._at += len(block)
    return block


class _Watched:
  """A stream that knows how it ended: tarfile takes an archive cut between files, or mid-stream, for a whole one.

  Once it is damaged it stays so: some decompressors would go on behind the damage, with other bytes.
  """

  def __init__(self, file: _Readable):
    self._file, self._tail, self._again = file, b"", b""
    self._damage: Exception | None = None

  def read(self, size: int) -> bytes:
    if self._damage:
      raise self._damage
    if self._again:
      block, self._again = self._again, b""
      return block
    try:
      block = self._file.read(size)
    except _ERRORS as error:
      self._damage = error
      raise
    self._tail = (self._tail + block)[-2 * _RECORD :]
    return block

  def put_back(self, block: bytes) -> None:
    """Makes the next read give this block once more."""
    self._again = block

  def check_end(self) -> None:
    """Raises ValueError unless two blocks of zeros are at the end, as every archive has them."""
    if self._tail != bytes(2 * _RECORD):
      raise ValueError("no end-of-archive mark")


def _hidden(name: str) -> bool:
  return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _blocks(opened: Opened, name: str, path: str, after_block: Callable[[], None]) -> Iterator[bytes]:
  try:
    file = opened()
    while block := file.read(_BLOCK):
      yield block
      after_block()
  except _ERRORS as error:
    what = f"{path} is damaged or cut short at {name} ({error})"
    if path.lower().endswith(".zip"):
      raise BadItem(f"{what}; skip such files with --skip-bad") from error
    raise DataError(what) from error
