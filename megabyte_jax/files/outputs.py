"""Checks before any work whether outputs can be written, and puts errors of the file system in words."""

from __future__ import annotations

import errno
import os
import re
import tempfile

from megabyte_jax.errors import require
from megabyte_jax.files import object_stores
from megabyte_jax.files.atomic_file import final_path, is_written_into

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_NAMES = re.compile(r"(pretrained|sample|tfds|hf):(?!//)")
_NO_CURRENT_FOLDER = "the current folder was removed; change to one that is there"


def check_output_file(name: str, path: str) -> None:
  """Checks that a file can be written where the argument `name` says, and leaves nothing there.

  Devices and pipes are not opened: only their permissions are looked at.

  Raises:
    ConfigError: `path` is a folder or lies where nothing can be written; names what to do.
  """
  _check_place(name, path, "a file")
  if object_stores.is_remote(path):
    return
  require(not os.path.isdir(path) and path[-1:] != "/", f"{name}={path} is a folder; name a file")
  problem = ""
  try:
    if is_written_into(path):
      require(os.access(path, os.W_OK), f"{name}={path} may not be written to; change its permissions or {name}")
      return
  except NotADirectoryError:
    pass  # said below, with the file's name
  except OSError as error:
    problem = f"{name}={path}: {error.strerror}; choose another {name}"
  require(not problem, problem)
  _try_to_write(name, path, os.path.dirname(os.path.abspath(final_path(path))))


def check_output_folder(name: str, path: str) -> None:
  """Checks that files can be written in the folder that the argument `name` gives, and leaves nothing there.

  Raises:
    ConfigError: they cannot; names what to do.
  """
  _check_place(name, path, "a folder")
  problem = ""
  if not object_stores.is_remote(path):
    try:
      _try_to_write(name, path, os.path.abspath(final_path(path)))
    except FileNotFoundError:  # of os.getcwd
      problem = f"{name}={path}: {_NO_CURRENT_FOLDER}"
  require(not problem, problem)


def check_on_disk(name: str, path: str) -> None:
  """Raises ConfigError where the argument `name` is a path of an object store; for what is written to disks only."""
  on_disk = not object_stores.is_remote(path)
  require(on_disk, f"{name}={path} is not on this machine's disks; write to a disk, then copy it there")


def check_folder_name(name: str, path: str) -> None:
  """Raises ConfigError where the name of a new folder would be read as that of something else: `sample:x`, say."""
  kind = _NAMES.match(path)
  require(not kind, f"{name}={path} would be read as a name of the kind {kind and kind[0]}NAME; write ./{path}")


def check_new_file(name: str, path: str) -> None:
  """Checks that no file of a disk would be lost by writing one where the argument `name` says.

  Raises:
    ConfigError: a file is there.
  """
  lost = os.path.isfile(path) and not is_written_into(path)
  require(not lost, f"{name}={path} exists; name another file, or give --force")


def check_new_folder(name: str, path: str) -> None:
  """Checks that a folder can be made where the argument `name` says: nothing is there, or an empty folder.

  Raises:
    ConfigError: something is there, or it is a place in an object store.
  """
  check_on_disk(name, path)
  place = final_path(path)
  require(not os.path.isdir(place) or not os.listdir(place), f"{name}={path} is not empty; name a new folder")


def _check_place(name: str, path: str, wanted: str) -> None:
  require(bool(path), f"{name} is empty; name {wanted}")
  scheme = object_stores.unknown_scheme(path)
  require(
    not scheme, f"{name}={path}: nothing can be written to {scheme}; name {wanted} on a disk or in a bucket (gs://)"
  )


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
  """Returns one line about an error; one of the file system names the file and what to do."""
  if not isinstance(error, OSError) or error.strerror is None:
    return str(error)
  path = error.filename2 or error.filename
  if not path and error.errno == errno.ENOENT:  # of os.getcwd
    return _NO_CURRENT_FOLDER
  if path and error.errno == errno.ENOENT:
    return f"{path} does not exist"
  said = f"{path}: {error.strerror}" if path else error.strerror
  if error.errno in NO_ROOM:
    return f"{said}; make room there, or name another place"
  if error.errno in _FORBIDDEN:
    return f"{said}; change its permissions, or name another place"
  if path and error.errno in _IN_THE_WAY:
    return f"{said}; move what is in the way elsewhere, or name another place"
  if error.errno == errno.EROFS:
    return f"{said}; name another place"
  return f"{said}; name a file" if error.errno == errno.EISDIR else said
