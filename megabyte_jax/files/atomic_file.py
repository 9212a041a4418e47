"""Writes files whole or not at all, and into devices and pipes as they stand: the one way to write an output."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from megabyte_jax.files.object_stores import is_remote

_temporaries: set[epath.Path] = set()  # of this process, now


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a temporary path to write to; what it holds becomes `path` when the block ends well.

  A reader of a file sees the old one or the new one, never a part. The folder is made where it is missing; after an
  exception the temporary file is removed and `path` is as it was. A symbolic link stays: the file that it leads to is
  replaced, and keeps its permissions. What exists and is not a regular file (a device, a pipe, a descriptor of this
  process such as /dev/stdout) is never replaced: the bytes are written into it.

  Raises:
    OSError: the file system refuses; names `path`.
  """
  name = os.fspath(path)
  try:
    if is_remote(name):
      yield from _renamed(epath.Path(name))
    elif is_written_into(name):
      yield from _copied(name)
    else:
      yield from _renamed(epath.Path(final_path(name)))
  except OSError as error:
    if error.errno is not None and (error.filename is None or _is_temporary(error.filename)):  # a full disk names none
      error.filename, error.filename2 = name, None
    raise


def remove_temporaries() -> None:
  """Removes what this process has half written, for its end where exceptions cannot do so."""
  for path in tuple(_temporaries):
    with contextlib.suppress(OSError):
      _remove(path)


@contextlib.contextmanager
def removed_at_the_end(temporary: epath.Path) -> Iterator[None]:
  """Removes a file or folder after the block, if it is still there; `remove_temporaries` does so before."""
  _temporaries.add(temporary)
  try:
    yield
  finally:
    _remove(temporary)
    _temporaries.discard(temporary)


def _remove(path: epath.Path) -> None:
  if path.is_dir():
    path.rmtree()
  elif path.exists():
    path.unlink()


def final_path(path: str) -> str:
  """Returns the local path that symbolic links lead to, existing or not."""
  return os.path.realpath(path) if os.path.islink(path) else path


def is_written_into(path: str) -> bool:
  """Returns True where a local path exists and is not a regular file, or is a descriptor of a process.

  Raises:
    OSError: the path cannot be looked at, such as a link that leads to itself.
  """
  if _descriptor(path) is not None:
    return True
  try:
    mode = os.stat(path).st_mode
  except FileNotFoundError:
    return False
  return not stat.S_ISREG(mode)


def is_standard_output(path: str) -> bool:
  """Returns True where a local path is this process's standard output, which then should get nothing else."""
  return _descriptor(path) == 1


def _descriptor(path: str) -> int | None:
  """The number of this process's descriptor that a path such as /dev/stdout or /dev/fd/3 leads to."""
  for _ in range(8):  # links, one by one: the last of them leads to the descriptor's own file
    folder, name = os.path.split(os.path.abspath(path))
    folder = os.path.realpath(folder)
    if name.isdecimal() and re.fullmatch(rf"/dev/fd|/proc/(self|thread-self|{os.getpid()})(/task/\d+)?/fd", folder):
      return int(name)
    if not os.path.islink(path):
      return None
    path = os.path.join(folder, os.readlink(path))
  return None


def _is_temporary(path: object) -> bool:
  return isinstance(path, str) and path.endswith(".tmp")


def _renamed(path: epath.Path) -> Iterator[epath.Path]:
  path.parent.mkdir(parents=True, exist_ok=True)
  short = path.name[:48]  # a file's name has at most 255 bytes
  temporary = path.parent / f".{short}.{uuid.uuid4().hex[:12]}.tmp"
  with removed_at_the_end(temporary):
    yield temporary
    if not is_remote(path) and os.path.exists(path):
      with contextlib.suppress(PermissionError):  # of another owner
        os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
    temporary.replace(path)


def _copied(path: str) -> Iterator[epath.Path]:
  """Writes to a temporary file first: what is written need not be written in order, and only once it is whole."""
  descriptor, name = tempfile.mkstemp(suffix=".tmp")
  os.close(descriptor)
  with removed_at_the_end(epath.Path(name)):
    yield epath.Path(name)
    number = _descriptor(path)
    if number == 1:
      sys.stdout.flush()
    target = path if number is None else os.dup(number)
    with open(name, "rb") as made, open(target, "wb") as file:
      shutil.copyfileobj(made, file)
