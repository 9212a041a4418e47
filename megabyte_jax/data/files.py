"""Reads files in place, as their bytes: one document per file."""

from __future__ import annotations

import codecs
import errno
import functools
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
from etils import epath

from megabyte_jax.data.file_handles import BUDGET, Handles
from megabyte_jax.data.sources import SKIP_HINT, Joined, NothingInside, Source, check_range, evenly_spaced, first_names
from megabyte_jax.errors import DataError
from megabyte_jax.files.object_stores import in_parallel, is_remote

_BLOCK = 4096  # bytes per place looked at for a fingerprint
_SAMPLED_FILES = 1024  # files whose contents are looked at; names and sizes of all are
_TOLD_BY = 1 << 14  # bytes per place of a large file that tell whether it is text
_ENDINGS_OF, _MOST_ENDINGS = 100_000, 100  # of so many files, so many different endings are looked at
_CONTROLS = re.compile(rb"[\x01-\x06\x10-\x19\x1c-\x1f]")  # those that texts in old encodings have none of
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_WHOLE_FILE, _WHOLE_TOTAL = 1 << 20, 1 << 27  # bytes of one file, and of all, that are looked at as a whole


class ByteFiles:
  """Files as they are, one document each, read where and when they are asked for.

  Args:
    paths, names: where the files are and what they are called.
    skip_bad: leave empty or unreadable files out, and count them in `skipped`, instead of raising DataError.
    skip_empty: do so with empty ones alone.
  """

  joinable, unit = True, 1

  def __init__(self, paths: Sequence[str], names: Sequence[str], skip_bad: bool = False, skip_empty: bool = False):
    self.paths, self.names, lengths = [], [], []
    self.skipped, self.skipped_names = 0, list[str]()
    self.slow = any(map(is_remote, paths))
    found = in_parallel(_length, paths, self.slow)
    tolerated = {"", _EMPTY} if skip_empty else {""}
    bad = [f"{path} {problem}" for path, (_, problem) in zip(paths, found, strict=True) if problem not in tolerated]
    if bad and not skip_bad:
      several = f"{len(bad):,} files are empty or unreadable: " if len(bad) > 1 else ""
      remedy = f"remove {'them' if several else 'it'}, or skip such files with {SKIP_HINT}"
      raise DataError(f"{several}{first_names(bad, len(bad))}; {remedy}")
    for path, name, (length, problem) in zip(paths, names, found, strict=True):
      if problem:
        self.skipped += 1
        self.skipped_names.append(name)
      else:
        self.paths.append(path)
        self.names.append(name)
        lengths.append(length)
    if not self.paths:
      kind = NothingInside if all(problem == _EMPTY for _, problem in found) else DataError
      raise kind(f"all {self.skipped} files are empty or unreadable, {paths[0]} for one")
    self.lengths = np.array(lengths, np.int64)
    self._warned = False
    self._modified: dict[int, int] = {}  # times of modification, in nanoseconds, of files that have been read
    self._file = Handles(functools.partial(_open_number, self.paths))

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the names and sizes of the files, and with blocks of bytes sampled from them."""
    return fingerprint_files(self.paths, self.names, self.lengths)

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Reads bytes; see `Source`. Raises DataError where the file is no longer as long as it was."""
    check_range(self, document, start, stop)
    path = self.paths[document]
    if is_remote(path):
      found = np.frombuffer(read_block(path, start, stop), np.uint8).copy()
    else:
      found = np.empty(stop - start, np.uint8)
      file = self._file(document)
      found = found[: _read_into(file, start, found)]
      self._check_unchanged(document, file)
    if len(found) != stop - start:
      raise DataError(f"{path} is no longer the {self.lengths[document]:,} bytes it was when opened; start again")
    return found

  def _check_unchanged(self, document: int, file: _Descriptor) -> None:
    """Warns, once, of a file that is written to while it is read."""
    now = os.fstat(file.number).st_mtime_ns
    if self._modified.setdefault(document, now) != now:
      self._modified[document] = now
      if not self._warned:
        self._warned = True
        logging.warning(
          "%s has been written to since it was opened: what is read from here on may be other data than the run began "
          "with; leave the files of a run alone, and start again",
          self.paths[document],
        )


def open_file(path: str) -> IO[bytes]:
  """Opens a local or remote file for reading, also where too many files are open that can be closed.

  Raises:
    DataError: too many are open even so.
    OSError: the file cannot be opened.
  """
  if is_remote(path):
    return BUDGET.with_room(lambda: epath.Path(path).open("rb"))
  return BUDGET.with_room(lambda: open(path, "rb"))


class _Descriptor:
  """A file that closes with the last reference to it, without the warning that Python's own gives."""

  def __init__(self, path: str):
    self.number = -1
    self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

  def __del__(self) -> None:
    if self.number >= 0:
      os.close(self.number)


def _open_number(paths: Sequence[str], i: int) -> _Descriptor:
  try:
    return _Descriptor(paths[i])
  except OSError as error:
    if error.errno in (errno.EMFILE, errno.ENFILE):
      raise
    raise DataError(f"{paths[i]} is no longer there, or cannot be read any more ({error.strerror})") from error


def _read_into(file: _Descriptor, start: int, out: np.ndarray) -> int:
  """Fills `out` from byte `start` on; fewer bytes than it holds where the file ends. Returns how many.

  Not through a memory map: one of a file that has been cut short kills the process when it is touched.
  """
  done = 0
  while done < len(out) and (count := os.preadv(file.number, [out[done:].data], start + done)):
    done += count
  return done


_EMPTY = "is empty"


def _length(path: str) -> tuple[int, str]:
  """(bytes, what is wrong with the file)."""
  try:
    length = _size_of(path)
  except OSError as error:
    return 0, why_unreadable(path, error)
  if length and not is_remote(path) and not os.access(path, os.R_OK):
    return 0, "cannot be read (permission denied)"
  if not length and not is_remote(path) and _holds_bytes(path):
    return 0, "has no size, though it holds bytes, as files of /proc do: copy it, and name the copy"
  return length, "" if length else _EMPTY


def why_unreadable(path: str, error: OSError) -> str:
  """Returns the end of a sentence about a file that cannot be opened or looked at."""
  if isinstance(error, FileNotFoundError) and os.path.islink(path):
    return f"is a link whose target {os.path.realpath(path)} is missing"
  return f"cannot be read ({error.strerror or error})"


def _holds_bytes(path: str) -> bool:
  try:
    with open(path, "rb") as file:
      return bool(file.read(1))
  except OSError:
    return False


def _size(path: str) -> int:
  """Bytes of a file; -1 where there is none."""
  try:
    return _size_of(path)
  except OSError:
    return -1


def _size_of(path: str) -> int:
  return epath.Path(path).stat().length if is_remote(path) else os.stat(path).st_size


def read_block(path: str, start: int, stop: int) -> bytes:
  """Returns bytes [start, stop) of a local or remote file; fewer where the file ends before.

  Raises:
    DataError: the file cannot be read.
  """
  try:
    with open_file(path) as file:
      file.seek(start)
      return file.read(stop - start)
  except OSError as error:
    raise DataError(f"{path} {why_unreadable(path, error)}") from error


def read_whole(path: str) -> bytes:
  """Returns all bytes of a local or remote file. Raises DataError naming it where that fails."""
  try:
    with open_file(path) as file:
      return file.read()
  except OSError as error:
    raise DataError(f"{path} {why_unreadable(path, error)}") from error


def sizes_of(paths: Sequence[str]) -> list[int]:
  """Returns the bytes of each file; -1 where it cannot be looked at."""
  return in_parallel(_size, paths, any(map(is_remote, paths)))


class Kinds(NamedTuple):
  """Says which files hold no text, or text in another encoding.

  Attributes:
    looked_at: files that were looked at.
    binary: names of those that hold no text.
    not_utf8: names of those that hold text, but not in UTF-8 or, with a byte-order mark, UTF-16.
  """

  looked_at: int
  binary: list[str]
  not_utf8: list[str]


def files_of(source: Source) -> Iterator[tuple[ByteFiles, bool]]:
  """Yields the files that are documents themselves, of each part of a source; and whether records are beside them."""
  for part in source.sources if isinstance(source, Joined) and source.specs else [source]:
    for files in part.sources if isinstance(part, Joined) else [part]:
      if isinstance(files, ByteFiles):
        yield files, isinstance(part, Joined)


def look_into(files: ByteFiles) -> Kinds:
  """Looks into local files: as a whole where the fingerprint does, else at the beginning, in the middle and at the end.

  Of more than 1,024 files these are the evenly spaced ones that the fingerprint looks into, and the first with each
  ending.
  """
  chosen = [i for i in _to_look_at(files.paths) if not is_remote(files.paths[i])]
  whole = _read_whole_up_to(len(files.paths))
  kinds = {i: _kind(files.paths[i], int(files.lengths[i]), whole) for i in chosen}
  binary, not_utf8 = ([files.names[i] for i in chosen if kinds[i] == kind] for kind in ("binary", "not UTF-8"))
  return Kinds(sum(map(bool, kinds.values())), binary, not_utf8)


def _to_look_at(paths: Sequence[str]) -> list[int]:
  first: dict[str, int] = {}
  for i, path in enumerate(itertools.islice(paths, _ENDINGS_OF)):
    if len(first) < _MOST_ENDINGS:
      first.setdefault(os.path.splitext(path)[1].lower(), i)
  return sorted({*first.values(), *evenly_spaced(len(paths), _SAMPLED_FILES)})


def _kind(path: str, length: int, whole: int) -> str:
  """text | binary | not UTF-8, by places in a file; '' where it cannot be read, which is said when it is."""
  places = _places(length, whole, _TOLD_BY)
  try:
    blocks = [read_block(path, *place) for place in places]
  except DataError:
    return ""
  if blocks[0].startswith(UTF16_MARKS) and not blocks[0].startswith(b"\xff\xfe\0\0"):  # which marks UTF-32
    return "text"
  if any(b"\0" in block for block in blocks) or blocks[0].startswith(b"%PDF-"):
    return "binary"
  odd = [block for block, place in zip(blocks, places, strict=True) if not _is_utf8(block, *place, length)]
  return "text" if not odd else "binary" if any(map(_CONTROLS.search, odd)) else "not UTF-8"


def _is_utf8(block: bytes, start: int, stop: int, length: int) -> bool:
  """Tells whether bytes [start, stop) of a file are UTF-8, whose first and last character may be cut."""
  begin = next((i for i, byte in enumerate(block[:4]) if byte & 0xC0 != 0x80), 4) if start else 0
  try:
    codecs.getincrementaldecoder("utf-8")().decode(block[begin:], final=stop == length)
  except UnicodeDecodeError:
    return False
  return True


def fingerprint_files(paths: Sequence[str], names: Sequence[str], lengths: Sequence[int] | np.ndarray) -> str:
  """Returns a fingerprint of all names and lengths and of what the files hold.

  Of files of at most 1 MiB that is every byte; of larger ones three blocks of 4 KiB, at the beginning, in the middle
  and at the end. Of more than 1,024 files only evenly spaced ones are looked into, and of more than 128 files only
  those of at most 128 MiB / files (128 KiB where there are 1,024) as a whole. So it is cheap for data of any size.
  Times of change are left out: a copy of the data counts as the same data.
  """
  sampled = evenly_spaced(len(paths), _SAMPLED_FILES)
  whole = _read_whole_up_to(len(paths))
  files = [(paths[i], int(lengths[i]), whole) for i in sampled]
  looked_into = in_parallel(_contents, files, any(map(is_remote, paths)))
  digest = hashlib.sha256()
  for name, length in zip(names, lengths, strict=True):
    digest.update(os.fsencode(name) + f"\0{length}\0".encode())
  for contents in looked_into:
    digest.update(contents)
  return digest.hexdigest()[:16]


def _read_whole_up_to(files: int) -> int:
  """Bytes up to which each of so many files is read as a whole."""
  return min(_WHOLE_FILE, _WHOLE_TOTAL // max(1, min(files, _SAMPLED_FILES)))


def _places(length: int, whole: int, block: int) -> list[tuple[int, int]]:
  """Where a file is looked at: (first byte, byte after the last) of all of it, or of three blocks."""
  starts = sorted({0, max(0, length // 2 - block // 2), max(0, length - block)})
  return [(0, length)] if length <= whole else [(start, min(length, start + block)) for start in starts]


def _contents(file: tuple[str, int, int]) -> bytes:
  """Returns a digest of a file, (path, bytes, bytes up to which it is read as a whole), or of three blocks of it."""
  path, length, whole = file
  places = _places(length, whole, _BLOCK)
  try:
    return hashlib.sha256(b"".join(read_block(path, *place) for place in places if length > 0)).digest()
  except DataError:  # one that is skipped; others are reported when they are read
    return b""
