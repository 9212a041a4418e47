"""Keeps what is worked out once about data: indexes of records, and decompressed copies of files.

Everything lies in one folder that may be deleted at any time: `config.data.cache_dir`, or megabyte_jax in
$XDG_CACHE_HOME, or ~/.cache/megabyte_jax. Entries belong to a file of a certain size and time of modification; a file
that has changed since is looked at again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from megabyte_jax.data.files import why_unreadable
from megabyte_jax.errors import DataError
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.object_stores import is_remote
from megabyte_jax.files.user_cache import user_cache_folder

if TYPE_CHECKING:
  from _typeshed import ReadableBuffer as Buffer

_FORMAT = "megabyte_jax index 1"


def cache_folder(cache_dir: str) -> str:
  """Returns the folder that `config.data.cache_dir` names, or the default where it is empty."""
  if cache_dir:
    return os.path.expanduser(cache_dir)
  return user_cache_folder()


def identity(path: str) -> dict[str, Any]:
  """Returns what tells a version of a file from another: its path, size and time of modification.

  Raises:
    DataError: the file cannot be looked at.
  """
  try:
    if is_remote(path):
      found = epath.Path(path).stat()
      return {"path": path, "size": found.length, "modified": found.mtime}
    status = os.stat(path)
    return {"path": os.path.realpath(path), "size": status.st_size, "modified": status.st_mtime_ns}
  except OSError as error:
    raise DataError(f"{path} {why_unreadable(path, error)}") from error


def entry_name(*parts: object) -> str:
  """Returns the name under which something is kept: a hash of `parts`."""
  return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()[:32]


@contextlib.contextmanager
def held(folder: str, name: str) -> Iterator[None]:
  """Waits until no other process works on the entry `name`, and keeps the others waiting.

  Where the file system has no locks, nothing is held: then several do the same work, and the last result stays.

  Raises:
    OSError: the folder cannot be made or written to.
  """
  os.makedirs(folder, exist_ok=True)
  descriptor = os.open(os.path.join(folder, f"{name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


def remove_versions(folder: str, name: str) -> None:
  """Removes NAME-... of an entry that is held: of data as they were before, or of an attempt that was killed.

  Raises:
    OSError: one cannot be removed.
  """
  for old in os.listdir(folder):
    if old.lstrip(".").startswith(f"{name}-"):
      os.unlink(os.path.join(folder, old))


def load_index(path: str, belongs_to: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
  """Returns the arrays and notes that `save_index` wrote; None if there are none, or they are damaged or of other data.

  Args:
    path: of the index.
    belongs_to: what they must have been saved for.
  """
  try:
    with open(path, "rb") as file:
      promised, everything = file.readline().strip(), file.read()
    if hashlib.sha256(everything).hexdigest().encode() != promised:
      return None
    place = everything.index(b"\n") + 1
    head = json.loads(everything[:place])
    if head["format"] != _FORMAT or head["belongs_to"] != dict(belongs_to):
      return None
    arrays = {}
    for name, kind, count in head["arrays"]:
      arrays[name] = np.frombuffer(everything, kind, count, place) if count else np.zeros(0, kind)
      place += arrays[name].nbytes
    return arrays, head["notes"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None


def save_index(
  path: str, belongs_to: Mapping[str, Any], arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]
) -> None:
  """Writes arrays and notes about the data that `belongs_to` describes; the file appears whole or not at all.

  A folder that cannot be written to costs only the work of the next time, and is warned of.
  """
  whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
  head = {
    "format": _FORMAT,
    "belongs_to": dict(belongs_to),
    "arrays": [[name, array.dtype.str, int(array.size)] for name, array in whole.items()],
    "notes": dict(notes),
  }
  parts: list[Buffer] = [json.dumps(head).encode() + b"\n"]
  parts += [array.data.cast("B") for array in whole.values() if array.size]
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part)
  try:
    with replacing(path) as temporary, open(temporary, "wb") as file:
      file.write(digest.hexdigest().encode() + b"\n")
      file.writelines(parts)
  except OSError as error:
    logging.warning("the index %s cannot be kept (%s); set config.data.cache_dir", path, error.strerror or error)


@contextlib.contextmanager
def held_if_writable(folder: str, name: str) -> Iterator[None]:
  """Does as `held` does where the folder can be written to; elsewhere nothing is kept and nobody need wait."""
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):
      stack.enter_context(held(folder, name))
    yield
