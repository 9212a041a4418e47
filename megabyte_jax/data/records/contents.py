"""Reads compressed files as what they hold: each is decompressed once, into the cache folder."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import shlex
import zlib
from collections.abc import Callable, Sequence
from typing import IO

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import open_file, sizes_of, why_unreadable
from megabyte_jax.data.packing.decompression import Decompressed
from megabyte_jax.data.packing.zstd import ZstdFile
from megabyte_jax.data.records import cache
from megabyte_jax.data.sources import RAW_HINT, SKIP_HINT
from megabyte_jax.display.progress import Progress
from megabyte_jax.errors import DataError
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.outputs import NO_ROOM

_BLOCK = 1 << 20
_SHOWN = 1 << 25  # compressed bytes from which on the work is shown
MOST = 2 << 30  # compressed bytes of one source that are decompressed without being asked; several times that on disk
OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
  ".gz": lambda file: gzip.GzipFile(fileobj=file),  # type: ignore[dict-item,return-value]
  ".bz2": lambda file: io.BufferedReader(Decompressed(file, "bz2"), _BLOCK),
  ".xz": lambda file: io.BufferedReader(Decompressed(file, "xz"), _BLOCK),
  ".zst": lambda file: io.BufferedReader(ZstdFile(file), _BLOCK),
}
SUFFIXES = tuple(OPENERS)
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of damaged data


def is_compressed(name: str) -> bool:
  """Tells whether a name ends like that of a compressed file."""
  return name.lower().endswith(SUFFIXES)


def stem(name: str) -> str:
  """Returns a name without the ending of its compression."""
  return name[: name.rindex(".")] or name if is_compressed(name) else name


def decompressing(file: IO[bytes], path: str) -> IO[bytes]:
  """Returns a file of what the compressed `file` holds; `path` tells how it is compressed. See `ERRORS`."""
  return next(opener for ending, opener in OPENERS.items() if path.lower().endswith(ending))(file)


def decompressed(
  paths: Sequence[str], data: DataConfig, spec: str, skip_empty: bool = False
) -> list[tuple[str, str] | None]:
  """Returns for each path (the path to read, the path for errors): for a compressed one that of its copy.

  Args:
    paths: of any files.
    data: cache_dir; skip_bad, which gives None for a file that is damaged or holds nothing.
    spec: the source, for the command that packs it.
    skip_empty: give None for a file that holds nothing.

  Raises:
    DataError: a file cannot be read, is damaged, cut short or empty inside; all together are too large; there is no
      room for the copy.
  """
  compressed = [path for path in paths if is_compressed(path)]
  total = sum(sizes_of(compressed))
  if total > MOST:
    raise DataError(
      f"{spec} has {total:,} compressed bytes; pack what they hold first, and name that folder:",
      f"  {pack_command(spec, data)}",
      f"or take the compressed bytes as they are: {RAW_HINT}",
    )
  return [_copy_of(path, data, skip_empty) if is_compressed(path) else (path, path) for path in paths]


def pack_command(spec: str, data: DataConfig) -> str:
  """Returns the command that packs a source, as a shell takes it."""
  where = f" --tfds-dir={shlex.quote(data.tfds_dir)}" if data.tfds_dir and spec.startswith("tfds:") else ""
  skip = " --skip-bad" if data.skip_bad else ""
  return f"python -m megabyte_jax prepare pack {shlex.quote(spec)} FOLDER{where}{skip}"


def _copy_of(path: str, data: DataConfig, skip_empty: bool) -> tuple[str, str] | None:
  """Where the decompressed copy of a file is, which is made if need be; None for a file to be skipped."""
  folder = os.path.join(cache.cache_folder(data.cache_dir), "contents")
  try:
    belongs_to = cache.identity(path) | {"kind": "contents"}
    name = cache.entry_name(belongs_to["path"])
    copy = os.path.join(folder, f"{name}-{cache.entry_name(belongs_to)[:8]}")
    with cache.held(folder, name):
      length = _length_of_copy(copy, belongs_to)
      if length < 0:
        cache.remove_versions(folder, name)
        length = _decompress(path, copy, belongs_to["size"])
        cache.save_index(f"{copy}.index", belongs_to, {}, {"length": length})
  except DataError:
    if data.skip_bad:
      return None
    raise
  except OSError as error:
    what = f"there is no room for a copy of {path} in" if error.errno in NO_ROOM else f"{path}: no copy can be kept in"
    raise DataError(
      f"{what} {folder} ({error.strerror}); set config.data.cache_dir, or XDG_CACHE_HOME in the environment, or pack "
      "the data"
    ) from error
  if not length and not (data.skip_bad or skip_empty):
    raise DataError(f"{path} holds nothing; remove it, or skip such files with {SKIP_HINT}")
  return (copy, path) if length else None


def _length_of_copy(copy: str, belongs_to: dict) -> int:
  """Bytes of a copy; -1 where there is none, or it is not whole."""
  found = cache.load_index(f"{copy}.index", belongs_to)
  try:
    length = os.stat(copy).st_size
  except OSError:
    return -1
  return length if found and found[1].get("length") == length else -1


def _decompress(path: str, copy: str, size: int) -> int:
  """Writes what a file holds to `copy` and returns how many bytes that are.

  Raises:
    DataError: the file cannot be read, is damaged or cut short.
    OSError: the copy cannot be written.
  """
  with (
    _opened(path) as file,
    replacing(copy) as temporary,
    open(temporary, "wb") as out,
    Progress(f"decompressing {path}", size, enabled=size > _SHOWN) as progress,
  ):
    opened = decompressing(file, path)
    while block := _next_block(opened, path):
      out.write(block)
      progress.update(file.tell())
    out.flush()
    os.fsync(out.fileno())
    return out.tell()


def _opened(path: str) -> IO[bytes]:
  try:
    return open_file(path)
  except OSError as error:  # no fault of the folder of the copy
    raise DataError(f"{path} {why_unreadable(path, error)}; skip such files with {SKIP_HINT}") from error


def _next_block(opened: IO[bytes], path: str) -> bytes:
  try:
    return opened.read(_BLOCK)
  except ERRORS as error:
    raise DataError(f"{path} is damaged or cut short ({error}); get it anew") from error
