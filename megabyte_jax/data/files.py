"""Reads files in place, as their bytes: one document per file."""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from typing import IO

import numpy as np
from etils import epath

from megabyte_jax.data.file_handles import BUDGET, Handles
from megabyte_jax.data.sources import SKIP_HINT, check_range
from megabyte_jax.errors import DataError
from megabyte_jax.files.object_stores import in_parallel, is_remote

_BLOCK = 4096  # bytes per place looked at for a fingerprint
_SAMPLED_FILES = 1024  # files whose contents are looked at; names and sizes of all are
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
    self.paths, self.names, lengths, self.skipped = [], [], [], 0
    self.slow = any(map(is_remote, paths))
    found = in_parallel(_length, paths, self.slow)
    for path, name, (length, problem) in zip(paths, names, found, strict=True):
      skip = skip_bad or (skip_empty and problem == _EMPTY)
      if problem and not skip:
        raise DataError(f"{path} {problem}; remove it, or skip such files with {SKIP_HINT}")
      if problem:
        self.skipped += 1
      else:
        self.paths.append(path)
        self.names.append(name)
        lengths.append(length)
    if not self.paths:
      raise DataError(f"all {self.skipped} files are empty or unreadable, {paths[0]} for one")
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


def fingerprint_files(paths: Sequence[str], names: Sequence[str], lengths: Sequence[int] | np.ndarray) -> str:
  """Returns a fingerprint of all names and lengths and of what the files hold.

  Of files of at most 1 MiB that is every byte; of larger ones three blocks of 4 KiB, at the beginning, in the middle
  and at the end. Of more than 1,024 files only evenly spaced ones are looked into, and of more than 128 files only
  those of at most 128 MiB / files (128 KiB where there are 1,024) as a whole. So it is cheap for data of any size.
  Times of change are left out: a copy of the data counts as the same data.
  """
  sampled = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _SAMPLED_FILES)).astype(int))
  whole = min(_WHOLE_FILE, _WHOLE_TOTAL // len(sampled))
  files = [(paths[i], int(lengths[i]), whole) for i in sampled]
  looked_into = in_parallel(_contents, files, any(map(is_remote, paths)))
  digest = hashlib.sha256()
  for name, length in zip(names, lengths, strict=True):
    digest.update(os.fsencode(name) + f"\0{length}\0".encode())
  for contents in looked_into:
    digest.update(contents)
  return digest.hexdigest()[:16]


def _contents(file: tuple[str, int, int]) -> bytes:
  """Returns a digest of a file, (path, bytes, bytes up to which it is read as a whole), or of three blocks of it."""
  path, length, whole = file
  starts = sorted({0, max(0, length // 2 - _BLOCK // 2), max(0, length - _BLOCK)})
  places = [(0, length)] if length <= whole else [(start, min(length, start + _BLOCK)) for start in starts]
  try:
    return hashlib.sha256(b"".join(read_block(path, *place) for place in places if length > 0)).digest()
  except DataError:  # one that is skipped; others are reported when they are read
    return b""
