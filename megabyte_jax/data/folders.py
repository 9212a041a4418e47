"""Finds the files that a path, a folder or a glob names."""

from __future__ import annotations

import functools
import glob
import itertools
import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence

from etils import epath

from megabyte_jax.data.file_handles import BUDGET
from megabyte_jax.data.source_names import split_field, split_list
from megabyte_jax.errors import DataError
from megabyte_jax.files import object_stores

_DEEPEST = 200  # folders within folders
_MOST_VISITS = 100  # of one folder, through links
ARRAYS = (".npz", ".npy", ".pkl", ".pickle")  # endings of files of arrays, which are no documents
ARRAYS_HINT = "images in arrays are written as files first, as docs/data.md shows under Images in arrays"
_PACKED = ("data.bin", "ends.npy", "ends", "names.txt", "manifest.json")  # see packing/packed_folder.py


def find_files(spec: str, suffixes: Sequence[str] = (), wanted: str = "") -> tuple[list[str], list[str]]:
  """Returns the paths of a file, of all files below a folder or of a glob (`**`: any depth), and short names for them.

  The paths are sorted. Hidden files and folders are left out of folders. Links are followed, but not to a folder in
  which they lie themselves. Links to nothing are among the files: whoever reads them says so. The names do not change
  when a folder is moved as a whole.

  Args:
    spec: a path or a glob, local or remote.
    suffixes: leave files without one of these out of folders; empty takes all.
    wanted: what files with these suffixes are, in the plural. Where it is given, one warning counts by their endings
      the files that are left out.

  Raises:
    DataError: there are no such files, a folder cannot be listed, holds packed data, or is nested too deeply.
  """
  is_remote = object_stores.is_remote(spec)
  if _is_glob(spec):
    base = _fixed_part(spec)
    paths = _remote_glob(base, spec) if is_remote else _local_glob(base, spec)
    _refuse_packed(spec, paths)
  else:
    path = epath.Path(spec)
    if not path.exists():
      if os.path.islink(spec):
        raise DataError(
          f"{spec} is a link whose target {os.path.realpath(spec)} is missing; name a file or folder that exists"
        )
      raise DataError(f"{spec} does not exist; name a file, a folder, a glob, sample:NAME or tfds:NAME:SPLIT")
    if not path.is_dir():
      if spec.endswith("/") and not is_remote:
        raise DataError(f"{spec} is a file; leave out the / behind it")
      return [spec], [path.name]
    base = spec
    everything = (_walk_remote if is_remote else _walk)(spec)
    _refuse_packed(spec, everything)
    paths = [p for p in everything if _wanted(os.path.basename(p), suffixes)]
    if not paths:
      raise DataError(_nothing_in(spec, suffixes, everything))
    if wanted and (others := sorted({p for p in everything if _wanted(os.path.basename(p), ())}.difference(paths))):
      _warn_once(
        f"{spec}: {len(others):,} of {len(others) + len(paths):,} files are left out, as they are not {wanted} "
        f"of a kind that is read: {_kinds(others)}"
      )
  if not paths:
    raise DataError(f"no file matches {spec}; name a file, a folder or another glob")
  paths.sort()
  return paths, [_below(base, path) for path in paths]


def _below(base: str, path: str) -> str:
  """The name of a file below a folder; globs write paths with fewer slashes than their patterns may have."""
  if path.startswith(base) or object_stores.is_remote(path):
    return path[len(base) :].lstrip("/")
  return os.path.relpath(path, base)


def inside_source(path: str, spec: str) -> str:
  """Returns the name, of those in a list of sources, of a local folder or `**/*` in which `path` lies; '' for none.

  What is written into such a place would become data: it changes them, and is read as if it were text. A place that is
  hidden within the folder is left out there and may be written to.
  """
  if object_stores.is_remote(path):
    return ""
  place = os.path.realpath(path)
  for name in split_list(spec) if spec else ():
    folder, _ = split_field(name)
    if "**" in folder and folder.rstrip("/").endswith("*") and not os.path.exists(folder):  # of all kinds of files
      folder = _fixed_part(folder) or "."
    if not os.path.isdir(folder):
      continue
    inner = os.path.relpath(place, os.path.realpath(folder)).split(os.sep)
    if inner[0] != os.pardir and not (inner != ["."] and any(part.startswith(".") for part in inner)):
      return name
  return ""


def overlaps(path: str, spec: str) -> bool:
  """Tells whether a local file or folder lies in a folder of a list of sources, or is or has a file that it names.

  Files are also named by globs, and are the same however their paths are written.
  """
  if inside_source(path, spec):
    return True
  place = os.path.realpath(path)
  names = [name for name, _ in map(split_field, split_list(spec))]
  globs = (name for name in names if _is_glob(name))
  matched = (file for pattern in globs for file in _local_glob(_fixed_part(pattern), pattern))
  files = map(os.path.realpath, itertools.chain(filter(os.path.isfile, names), matched))
  return any(file == place or file.startswith(f"{place}{os.sep}") for file in files)


def _refuse_packed(spec: str, paths: Sequence[str]) -> None:
  """Raises DataError where files that a folder or a glob names are parts of packed folders: these are not documents."""
  there = set(paths)

  def exists(path: str) -> bool:  # a glob may match one part alone
    return path in there or epath.Path(path).exists()

  for path in paths:
    inner, name = os.path.split(path)
    data, *ends = (os.path.join(inner, part) for part in ("data.bin", "ends.npy", "ends"))
    if name in _PACKED and exists(data) and any(map(exists, ends)):
      raise DataError(
        f"{spec} has the packed folder {inner or os.curdir} in it, whose files are not documents; name "
        f"{inner or os.curdir} itself (several sources are separated by commas), or move it elsewhere"
      )


def _nothing_in(folder: str, suffixes: Sequence[str], others: Sequence[str]) -> str:
  """Says of a folder without wanted files what it has instead, and what to do."""
  looked = f" (looked for {', '.join(suffixes)})" if suffixes else ""
  if not others:
    return f"no files in folder {folder}{looked}; name one that has some"
  form = ", or set config.data.form to what these are" if suffixes else ""
  seen = {os.path.splitext(path)[1].lower() for path in others if not os.path.basename(path).startswith(".")}
  if ".png" in suffixes and seen and seen.issubset(("", *ARRAYS)):
    form = f"; {ARRAYS_HINT}"
  return f"no files in folder {folder}{looked}, but others: {_kinds(others)}; name another folder{form}"


def _kinds(paths: Sequence[str]) -> str:
  """Counts files by ending, the four most frequent ones."""
  names = [os.path.basename(path) for path in paths]
  kinds = Counter("hidden" if n.startswith(".") else os.path.splitext(n)[1].lower() or "without ending" for n in names)
  return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(4)) + ", ..." * (len(kinds) > 4)


@functools.lru_cache(maxsize=256)  # evaluation opens the training data once more
def _warn_once(line: str) -> None:
  logging.warning("%s", line)


def _fixed_part(pattern: str) -> str:
  """The folders of a glob before the first wildcard."""
  parts = pattern.split("/")
  first = next(i for i, part in enumerate(parts) if _has_wildcards(part))
  return "/".join(parts[:first]) + "/" if first else ""


def _wanted(name: str, suffixes: Sequence[str]) -> bool:
  return not name.startswith(".") and (not suffixes or name.lower().endswith(tuple(suffixes)))


def _walk(folder: str, above: tuple[tuple[int, int], ...] = (), visits: Counter | None = None) -> list[str]:
  """All files below a local folder, whose own folders are known by device and number: `above`.

  `visits` counts how often each folder was read: links to links of links can lead to one in millions of ways.
  """
  visits = Counter() if visits is None else visits
  try:
    here = os.stat(folder)
    entries = BUDGET.with_room(lambda: sorted(os.scandir(folder), key=lambda entry: entry.name))
  except OSError as error:
    raise DataError(f"folder {folder} cannot be listed ({error.strerror or error}); make it readable") from error
  above = (*above, (here.st_dev, here.st_ino))
  visits[above[-1]] += 1
  if len(above) > _DEEPEST:
    raise DataError(f"folder {folder[:200]}... is nested more than {_DEEPEST} folders deep; name one further down")
  if visits[above[-1]] > _MOST_VISITS:
    raise DataError(f"links lead to folder {folder} in more than {_MOST_VISITS} ways; remove them, or name it alone")
  found, strange = [], 0
  for entry in entries:
    place = _folder_at(entry)
    if place is None:
      if _is_file(entry.path):
        found.append(entry.path)
      elif not entry.name.startswith("."):
        strange += 1
    elif not entry.name.startswith(".") and place not in above:  # a link back to where we come from has nothing new
      found += _walk(entry.path, above, visits)
  if strange:
    _warn_once(f"{folder}: {strange:,} entries are left out, as they are not files but pipes, sockets or devices")
  return found


def _folder_at(entry: os.DirEntry[str]) -> tuple[int, int] | None:
  """Device and number of a folder; None for what is none, such as a link to nothing or to itself."""
  try:
    return (entry.stat().st_dev, entry.stat().st_ino) if entry.is_dir() else None
  except OSError:
    return None


def _is_file(path: str) -> bool:
  """Tells whether something is a file or a link to nothing (or to itself), and no socket, pipe or device."""
  try:
    return stat.S_ISREG(os.stat(path).st_mode)
  except OSError:
    return True


def _walk_remote(folder: str) -> list[str]:
  """All files below a folder of an object store, by one request a folder."""

  def cannot(error: OSError) -> None:
    raise DataError(f"folder {folder} cannot be listed ({error})") from error

  scheme, found = folder.partition("://")[0], []
  for root, folders, names in epath.Path(folder).walk(on_error=cannot):
    folders[:] = [name for name in folders if not name.startswith(".")]
    inside = os.fspath(root).removeprefix(f"{scheme}://").strip("/")  # file systems give it with the scheme or without
    found += [f"{scheme}://{inside}/{name}" for name in names if name]
  return found


def _is_glob(spec: str) -> bool:
  return _has_wildcards(spec) and not os.path.exists(spec)


def _has_wildcards(text: str) -> bool:
  return any(c in text for c in "*?[")


def _local_glob(base: str, pattern: str) -> list[str]:
  if "**" in pattern and os.path.isdir(base or "."):
    _walk(base or ".")  # for its errors: glob says nothing of folders that it cannot list
  return [p for p in glob.glob(pattern, recursive=True) if not os.path.isdir(p) and _is_file(p) and not _in_a_loop(p)]


def _in_a_loop(path: str) -> bool:
  """Tells whether the folders of a path are within themselves, by a link."""
  return _folder_in_a_loop(os.path.dirname(path))


@functools.lru_cache(maxsize=4096)
def _folder_in_a_loop(folder: str) -> bool:
  parent = os.path.dirname(folder)
  if parent == folder or not folder:
    return False
  if os.path.islink(folder):
    target = os.path.realpath(folder)
    if f"{os.path.realpath(parent)}/".startswith(f"{target.rstrip('/')}/"):
      return True
  return _folder_in_a_loop(parent)


def _remote_glob(base: str, pattern: str) -> list[str]:
  paths = list(epath.Path(base).glob(pattern[len(base) :].lstrip("/")))
  folders = object_stores.in_parallel(lambda path: path.is_dir(), paths, remote=True)
  return [str(path) for path, is_folder in zip(paths, folders, strict=True) if not is_folder]
