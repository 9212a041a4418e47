"""What a command writes: whether that is possible, asked before any work, and what is said where it was not."""

from __future__ import annotations

import errno
import os
import tempfile

from megabyte_jax.errors import require
from megabyte_jax.files import object_stores

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM)


def check_output_file(name: str, path: str) -> None:
  """Raises ConfigError where the argument `name` gives a path at which no file can be written; leaves nothing there."""
  if object_stores.is_remote(path):
    return
  require(not os.path.isdir(path) and path[-1:] != "/", f"{name}={path} is a folder; name a file")
  _try_to_write(name, path, os.path.dirname(os.path.abspath(path)))


def check_output_folder(name: str, path: str) -> None:
  """Raises ConfigError where the argument `name` gives a folder in which no files can be written; leaves nothing."""
  if not object_stores.is_remote(path):
    _try_to_write(name, path, os.path.abspath(path))


def _try_to_write(name: str, path: str, folder: str) -> None:
  while not os.path.lexists(folder):  # missing ones are made
    folder = os.path.dirname(folder)
  another = f"choose another {name}"
  require(os.path.isdir(folder), f"{name}={path}: {folder} is a file, not a folder; {another}")
  problem = ""
  try:
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(b"a byte: full disks take empty files")
  except OSError as error:
    room = "make room there, or " if error.errno in NO_ROOM else ""
    problem = f"{name}={path}: no file can be written in {folder} ({error.strerror}); {room}{another}"
  require(not problem, problem)


def in_words(error: Exception) -> str:
  """One line about an error; one of the file system names the file and what to do."""
  if not isinstance(error, OSError) or error.strerror is None:
    return str(error)
  path = error.filename2 or error.filename
  if path and error.errno == errno.ENOENT:
    return f"{path} does not exist"
  said = f"{path}: {error.strerror}" if path else error.strerror
  if error.errno in NO_ROOM:
    return f"{said}; make room there, or name another place"
  if error.errno in _FORBIDDEN:
    return f"{said}; change its permissions, or name another place"
  if error.errno == errno.EROFS:
    return f"{said}; name another place"
  return f"{said}; name a file" if error.errno == errno.EISDIR else said
