"""Byte files: a file, a folder or a glob, memory-mapped. One file is one document."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data.sources import DataError, Source, check_range

_BLOCK = 4096  # bytes per place looked at for a fingerprint
_SAMPLED_FILES = 1024  # files whose contents are looked at; names and sizes of all are
_OPEN_FILES = 256  # memory maps held open at once


def open_files(spec: str, data: DataConfig) -> Source:
  """The files that a path or glob names, as `data.form` says.

  Raises:
    DataError: there are none, or one is empty or cannot be read.
  """
  from megabyte_jax.data import packed  # noqa: PLC0415  (packed data are byte files underneath)

  if packed.is_packed(spec):
    return packed.Packed(spec, data)
  if data.form == "image":
    from megabyte_jax.data import image_source, images  # noqa: PLC0415

    return image_source.Images(image_source.ImageFiles(*find_files(spec, images.SUFFIXES)), data)
  if data.form == "audio":
    from megabyte_jax.data import audio  # noqa: PLC0415

    return audio.AudioFiles(*find_files(spec, audio.SUFFIXES), data)
  return ByteFiles(*find_files(spec), skip_bad=data.skip_bad)


def find_files(spec: str, suffixes: Sequence[str] = ()) -> tuple[list[str], list[str]]:
  """Paths of a file, of all files below a folder, or of a glob (`**` for any depth), sorted, and short names for them.

  Hidden files and folders, and files without one of `suffixes` (if any are given), are left out of folders.
  The names do not change when a folder is moved as a whole.
  """
  remote = "://" in spec
  if any(c in spec for c in "*?[") and not os.path.exists(spec):
    base = _fixed_part(spec)
    if remote:
      paths = [str(p) for p in epath.Path(base).glob(spec[len(base) :].lstrip("/")) if not p.is_dir()]
    else:
      paths = [p for p in glob.glob(spec, recursive=True) if os.path.isfile(p)]
    kind = "no file matches"
  else:
    path = epath.Path(spec)
    if not path.exists():
      raise DataError(f"{spec} does not exist; name a file, a folder, a glob, sample:NAME or tfds:NAME:SPLIT")
    if not path.is_dir():
      return [spec], [path.name]
    base, kind = spec, "no files in folder"
    paths = _walk(path, suffixes) if remote else _walk_local(spec, suffixes)
  if not paths:
    raise DataError(f"{kind} {spec}" + (f" (looked for {', '.join(suffixes)})" if suffixes else ""))
  paths.sort()
  return paths, [p[len(base) :].lstrip("/") for p in paths]


def _fixed_part(pattern: str) -> str:
  """The folders of a glob before the first wildcard."""
  parts = pattern.split("/")
  first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
  return "/".join(parts[:first]) + "/" if first else ""


def _wanted(name: str, suffixes: Sequence[str]) -> bool:
  return not name.startswith(".") and (not suffixes or name.lower().endswith(tuple(suffixes)))


def _walk_local(folder: str, suffixes: Sequence[str]) -> list[str]:
  found = []
  for root, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith(".")]
    found += [os.path.join(root, name) for name in names if _wanted(name, suffixes)]
  return [path for path in found if os.path.isfile(path)]  # no sockets, no dangling links


def _walk(folder: epath.Path, suffixes: Sequence[str]) -> list[str]:
  found = []
  for path in folder.iterdir():
    if path.is_dir():
      found += [] if path.name.startswith(".") else _walk(path, suffixes)
    elif _wanted(path.name, suffixes):
      found.append(str(path))
  return found


class ByteFiles:
  """Files as they are, one document each, mapped into memory while they are read (remote ones are read in place).

  Args:
    paths, names: where the files are and what they are called.
    skip_bad: leave empty or unreadable files out, and count them in `skipped`, instead of raising DataError.
  """

  joinable, unit = True, 1

  def __init__(self, paths: Sequence[str], names: Sequence[str], skip_bad: bool = False):
    self.paths, self.names, lengths, self.skipped = [], [], [], 0
    for path, name in zip(paths, names, strict=True):
      length, problem = _length(path)
      if problem and not skip_bad:
        raise DataError(f"{path} {problem}; remove it, or skip such files with --config.data.skip_bad=True")
      if problem:
        self.skipped += 1
      else:
        self.paths.append(path)
        self.names.append(name)
        lengths.append(length)
    if not self.paths:
      raise DataError(f"all {self.skipped} files are empty or unreadable, {paths[0]} for one")
    self.lengths = np.array(lengths, np.int64)
    self.slow = any("://" in path for path in self.paths)
    self._map = functools.lru_cache(maxsize=_OPEN_FILES)(self._open)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the names and sizes of the files, and with blocks of bytes sampled from them."""
    return fingerprint_files(self.paths, self.names, self.lengths)

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """See `Source.read`. Raises DataError where the file is no longer as long as it was."""
    check_range(self, document, start, stop)
    path = self.paths[document]
    if "://" in path:
      found = read_block(path, start, stop)
    else:
      # A map of a file that has since been cut short kills the process when touched, so look first.
      found = self._map(document)[start:stop] if _size(path) == self.lengths[document] else b""
    if len(found) != stop - start:
      raise DataError(f"{path} is no longer the {self.lengths[document]:,} bytes it was when opened; start again")
    return np.array(found, np.uint8) if isinstance(found, np.ndarray) else np.frombuffer(found, np.uint8)

  def _open(self, document: int) -> np.ndarray:
    return np.memmap(self.paths[document], np.uint8, mode="r", shape=(int(self.lengths[document]),))


def _length(path: str) -> tuple[int, str]:
  """(bytes, what is wrong with the file)."""
  try:
    length = epath.Path(path).stat().length if "://" in path else os.stat(path).st_size
  except OSError as error:
    return 0, f"cannot be read ({error.strerror or error})"
  if length and "://" not in path and not os.access(path, os.R_OK):
    return 0, "cannot be read (permission denied)"
  return length, "" if length else "is empty"


def _size(path: str) -> int:
  """Bytes of a local file; -1 where there is none."""
  try:
    return os.stat(path).st_size
  except OSError:
    return -1


def read_block(path: str, start: int, stop: int) -> bytes:
  """Bytes [start, stop) of a local or remote file; fewer where the file ends before."""
  with epath.Path(path).open("rb") if "://" in path else open(path, "rb") as file:
    file.seek(start)
    return file.read(stop - start)


def read_whole(path: str) -> bytes:
  """All bytes of a local or remote file. Raises DataError naming it where that fails."""
  try:
    return epath.Path(path).read_bytes()
  except OSError as error:
    raise DataError(f"{path} cannot be read ({error.strerror or error})") from error


def sizes_of(paths: Sequence[str]) -> list[int]:
  """Bytes of each file; -1 where it cannot be looked at."""
  return [epath.Path(path).stat().length if "://" in path else _size(path) for path in paths]


def fingerprint_files(paths: Sequence[str], names: Sequence[str], lengths: Sequence[int] | np.ndarray) -> str:
  """Hash of all names and lengths and of three blocks of each file (of evenly spaced ones where there are many).

  Cheap for files of any size. Times of change are left out, so that a copy of the data counts as the same data.
  """
  digest = hashlib.sha256()
  for name, length in zip(names, lengths, strict=True):
    digest.update(f"{name}\0{length}\0".encode())
  for i in np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _SAMPLED_FILES)).astype(int)):
    length = int(lengths[i])
    for start in sorted({0, max(0, length // 2 - _BLOCK // 2), max(0, length - _BLOCK)}):
      digest.update(read_block(paths[i], start, min(length, start + _BLOCK)))
  return digest.hexdigest()[:16]
