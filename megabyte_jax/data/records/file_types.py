"""Opens files as what their endings say: records, what compressed files hold, or their bytes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import UTF16_MARKS, ByteFiles
from megabyte_jax.data.folders import ARRAYS, ARRAYS_HINT, find_files
from megabyte_jax.data.records.contents import decompressed, is_compressed, pack_command, stem
from megabyte_jax.data.records.lines import Lines
from megabyte_jax.data.records.parquet import Parquet
from megabyte_jax.data.records.store import RecordStore, RecordTexts
from megabyte_jax.data.sources import RAW_HINT, SKIP_HINT, Joined, NothingInside, Source, evenly_spaced
from megabyte_jax.errors import ConfigError, DataError, require

_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet",)
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tzst")  # .tar.gz and the like are .tar, compressed
_UNREAD = (".lzma", ".lz", ".lz4", ".br", ".z", ".7z", ".rar")  # compressed in ways that nothing here reads


def kind_of(name: str, as_records: bool = False) -> str:
  """Returns what a file of this name holds: bytes | lines | parquet | archive, compressed or not, or unread.

  Args:
    as_records: a field was named, so that .json is JSON Lines, too, as compressed .json always is.
  """
  lower = name.lower()
  inside = stem(lower)
  if lower.endswith(_UNREAD) or holds_arrays(inside) or (is_compressed(inside) and inside != lower):
    return "unread"
  if inside.endswith(_ARCHIVES) or lower.endswith(_ARCHIVES):
    return "archive"
  if inside.endswith(_LINES) or (inside.endswith(".json") and (as_records or inside != lower)):
    return "lines"
  return "parquet" if inside.endswith(_PARQUET) else "bytes"


def holds_arrays(name: str) -> bool:
  """Tells whether a name ends like that of a file of arrays, NumPy's or a pickle."""
  return name.lower().endswith(ARRAYS)


def open_documents(path: str, field: str, data: DataConfig, spec: str, skip_empty: bool = False) -> Source:
  """Returns the texts and files that a path, folder or glob names, for config.data.form = bytes.

  Files that hold no records are documents themselves, compressed ones as what they hold. Where a folder or glob has
  both, files come first, then JSON Lines, then Parquet.

  Args:
    path: of a file or folder, or a glob.
    field: of the records; '' takes `text`. Where it is given, only files of records are read.
    data: skip_bad, cache_dir.
    spec: the source as it was named, for errors.
    skip_empty: leave out empty files of a folder or glob, see `open_path`.

  Raises:
    ConfigError: a field is named, but there are no records, or they have no such field.
    DataError: nothing is there, or something cannot be read.
  """
  paths, names = find_files(path)
  skip_empty = skip_empty and paths != [path]
  kinds = [kind_of(name, bool(field)) for name in names]
  if field:
    require(
      any(kind in ("lines", "parquet") for kind in kinds),
      f"{spec} names a field, but {path} has no records (.jsonl, .json, .parquet, compressed or not)",
    )
    kinds = [kind if kind in ("lines", "parquet") else "" for kind in kinds]
  skipped = [names[i] for i in _check_archives(paths, kinds, data, spec)]
  chosen = [i for i, kind in enumerate(kinds) if kind in ("bytes", "lines", "parquet")]
  copies = decompressed([paths[i] for i in chosen], data, spec, skip_empty)
  sources: list[ByteFiles | RecordTexts] = []
  empty: list[NothingInside] = []
  for kind in ("bytes", "lines", "parquet"):
    files = [(*copy, names[i]) for i, copy in zip(chosen, copies, strict=True) if copy and kinds[i] == kind]
    if not files:
      continue
    where, shown, called = (list(column) for column in zip(*files, strict=True))
    try:
      if kind == "bytes":
        called = [stem(name) if is_compressed(name) else name for name in called]
        sources.append(ByteFiles(where, called, skip_bad=data.skip_bad, skip_empty=skip_empty))
        _notice_utf16(sources[-1])
      elif kind == "lines":
        sources.append(RecordTexts(Lines(where, called, field or "text", data, shown, skip_empty)))
      else:
        sources.append(RecordTexts(Parquet(where, called, field or "text", data, spec, skip_empty)))
    except NothingInside as error:  # files of the other kinds may hold data
      if not (data.skip_bad or skip_empty):
        raise
      empty.append(error)
      skipped += called
  skipped += [names[i] for i, copy in zip(chosen, copies, strict=True) if copy is None]
  if not sources and empty:
    raise empty[0]
  if not sources:
    raise DataError(f"none of {len(skipped):,} files of {spec} can be read; they are empty, damaged or archives")
  for source in sources[:1]:
    source.skipped += len(skipped)
    source.skipped_names += skipped
  return sources[0] if len(sources) == 1 else Joined(sources)


_LOOKED_AT = 64  # files whose first bytes are looked at
_noticed: set[str] = set()


def _notice_utf16(files: Source) -> None:
  """Says, once for each, which files begin with the byte-order mark of UTF-16; their bytes are taken as they are."""
  for i in evenly_spaced(len(files.names), _LOOKED_AT):
    begins = files.read(i, 0, min(2, int(files.lengths[i]))).tobytes()
    if begins in UTF16_MARKS and (name := files.names[i]) not in _noticed:
      _noticed.add(name)
      logging.warning(
        "%s begins with the byte-order mark of UTF-16, so every other byte of Latin text is zero; it is read as it is; "
        "for UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW",
        name,
      )
      return


def unread(path: str) -> DataError:
  """Returns the error about a file of arrays, or whose kind of compression is not read, or that is compressed twice."""
  if holds_arrays(stem(path)):
    return DataError(
      f"{path} holds arrays, not text; {ARRAYS_HINT}; or take its bytes as they are with {RAW_HINT}, or leave such "
      f"files out with {SKIP_HINT}"
    )
  how = "twice" if is_compressed(path) else "in a way that is not read"
  return DataError(
    f"{path} is compressed {how}; decompress it first, take its bytes as they are with {RAW_HINT}, or leave such files "
    f"out with {SKIP_HINT}"
  )


def _check_archives(paths: Sequence[str], kinds: Sequence[str], data: DataConfig, spec: str) -> list[int]:
  """Returns which files are archives and left out. Raises DataError where there is one, and skip_bad is False."""
  found = [i for i, kind in enumerate(kinds) if kind in ("archive", "unread")]
  if data.skip_bad or not found:
    return found
  archives = [paths[i] for i in found if kinds[i] == "archive"]
  if not archives:
    raise unread(paths[found[0]])
  more = f", one of {len(archives):,}" if len(archives) > 1 else ""
  holds = "the files that it holds" if len(paths) == 1 else f"what {spec} and its archives hold"
  raise DataError(
    f"{archives[0]} is an archive{more}; pack {holds}, and name that folder:",
    f"  {pack_command(spec, data)}",
    f"or take the archive's own bytes: {RAW_HINT}" + ("" if len(paths) == 1 else f", or leave it out: {SKIP_HINT}"),
  )


def open_encoded(path: str, field: str, data: DataConfig, spec: str, suffixes: Sequence[str]) -> RecordStore | None:
  """Returns the Parquet records that hold images or recordings; None where a path, folder or glob has none.

  A folder that has files with one of `suffixes`, images themselves, is read for these alone.

  Raises:
    ConfigError: a field is named, but there are no Parquet files; or they have no such field.
    DataError: nothing is there, or a file is damaged.
  """
  if os.path.isfile(path) and not path.lower().endswith(_PARQUET):
    if field:
      raise ConfigError(f"{spec} names a field, but {path} is not a Parquet file")
    return None
  try:
    paths, names = find_files(path, (*suffixes, *_PARQUET))
  except DataError:
    if field:
      raise
    return None  # said with the endings of images
  tables = [i for i, name in enumerate(names) if name.lower().endswith(_PARQUET)]
  if not tables or (len(tables) < len(names) and not field):
    require(not field, f"{spec} names a field, but {path} has no Parquet files")
    return None
  return Parquet([paths[i] for i in tables], [names[i] for i in tables], field, data, spec)
