"""Lists a folder's files with sizes and checksums, which tells a damaged checkpoint from a whole one.

The storage layer below does not tell: an array whose file is gone can come back as zeros, and a changed byte inside
an array as another number.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from megabyte_jax.errors import CheckpointError
from megabyte_jax.files.json_files import read_json
from megabyte_jax.files.object_stores import is_remote

DIGESTS_FILE = "files.json"
_BLOCK = 1 << 22  # bytes read at once
_THREADS = 4  # crc32 lets go of the interpreter lock


def write_digests(folder: epath.Path, skip: Container[str] = ()) -> None:
  """Lists all files below `folder` in `folder`/files.json, as {relative path: [bytes, crc32]}.

  Args:
    folder: complete, but for the names in `skip`, which are not listed.
    skip: file names directly in `folder`.
  """
  names = [name for name in _files(folder) if name not in skip and name != DIGESTS_FILE]
  with ThreadPoolExecutor(_THREADS) as pool:
    digests = list(pool.map(lambda name: _digest(folder / name), names))
  (folder / DIGESTS_FILE).write_text(json.dumps(dict(zip(names, digests, strict=True))))


def find_damage(folder: epath.Path, part: str = "") -> str | None:
  """Describes the damage to the files of `folder` (or of its subfolder `part`); returns None if there is none."""
  try:
    everything = read_json(folder / DIGESTS_FILE, CheckpointError, "take another copy")
  except FileNotFoundError:
    return f"{DIGESTS_FILE} is missing"
  except (CheckpointError, OSError):
    return f"{DIGESTS_FILE} cannot be read"
  if not all(_is_digest(digest) for digest in everything.values()):
    return f"{DIGESTS_FILE} cannot be read"
  listed = {name: digest for name, digest in everything.items() if name.startswith(f"{part}/" if part else "")}
  if not listed:
    return f"{part or 'everything'} is missing"
  with ThreadPoolExecutor(_THREADS) as pool:
    problems = pool.map(lambda name: _problem(folder, name, *listed[name]), sorted(listed))
  return next((problem for problem in problems if problem), None)


def _is_digest(value: Any) -> bool:
  """Tells whether a value of files.json is [bytes, crc32], where an object store's crc32 is null."""
  return isinstance(value, list) and len(value) == 2 and type(value[0]) is int and type(value[1]) in (int, type(None))


def _problem(folder: epath.Path, name: str, size: int, crc: int | None) -> str | None:
  path = folder / name
  try:
    found = path.stat().length
    if found != size:
      return f"{name} has {found:,} bytes instead of {size:,}"
    if crc is not None and _digest(path)[1] not in (crc, None):
      return f"the contents of {name} have changed"
  except FileNotFoundError:
    return f"{name} is missing"
  except OSError as error:
    return f"{name} cannot be read ({error})"
  return None


def _digest(path: epath.Path) -> tuple[int, int | None]:
  """(bytes, crc32) of a local file; object stores keep checksums of their own, so there it is (bytes, None)."""
  if is_remote(path):
    return path.stat().length, None
  size = crc = 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return size, crc


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path, f"{prefix}{path.name}/")
    else:
      yield prefix + path.name
