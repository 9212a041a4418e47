"""Reads files from front to back as `prepare pack` does: plain and compressed ones, records, and archives of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import fingerprint_files, open_file, sizes_of, why_unreadable
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.folders import find_files
from megabyte_jax.data.packing import archives, packed_folder
from megabyte_jax.data.packing.archives import BadItem, Item
from megabyte_jax.data.records import hugging_face
from megabyte_jax.data.records.contents import ERRORS, decompressing, is_compressed, stem
from megabyte_jax.data.records.file_types import kind_of, unread
from megabyte_jax.data.records.lines import BadRecord, bad_line, lines_of, text_of
from megabyte_jax.data.records.parquet import Parquet
from megabyte_jax.data.records.store import RecordTexts
from megabyte_jax.data.source_names import split_field
from megabyte_jax.data.sources import SKIP_HINT
from megabyte_jax.errors import DataError

_BLOCK = 1 << 22


class Stream(NamedTuple):
  """Files that are read one after the other.

  Attributes:
    paths, names: where they are and what they are called.
    kinds: what each holds, see `kind_of`.
    sizes: bytes of each, as it lies on the disk.
    field: of records.
  """

  paths: list[str]
  names: list[str]
  kinds: list[str]
  sizes: list[int]
  field: str

  @property
  def fingerprint(self) -> str:
    """Changes with the files; see `fingerprint_files`."""
    return combine_fingerprints([fingerprint_files(self.paths, self.names, self.sizes), self.field])


def stream_of(spec: str) -> Stream | None:
  """Returns the files that a source names, where one of them is compressed or an archive; None for any other source.

  Raises:
    DataError: there are no such files.
  """
  if spec.startswith(("sample:", "tfds:", "hf:")) or packed_folder.is_packed(spec):
    return None
  path, field = split_field(spec)
  if hugging_face.is_saved(path):
    return None
  paths, names = find_files(path)
  kinds = [kind_of(name, bool(field)) for name in names]
  if field:
    chosen = [i for i, kind in enumerate(kinds) if kind in ("lines", "parquet")]
    paths, names, kinds = ([column[i] for i in chosen] for column in (paths, names, kinds))
  if not any(kind == "archive" or is_compressed(name) for kind, name in zip(kinds, names, strict=True)):
    return None
  return Stream(paths, names, kinds, sizes_of(paths), field)


def documents(stream: Stream, data: DataConfig, on_place: Callable[[int], None]) -> Iterator[Item]:
  """Yields (name, blocks of bytes) for each document of the files; None for one that is left out.

  With data.skip_bad a damaged file costs what lies behind the place of damage. That counts as one; so does the document
  in an archive that the damage is in. A document whose blocks are not read changes nothing about those after it.

  Args:
    stream: the files.
    data: skip_bad and cache_dir.
    on_place: called now and then with how many bytes of all files have been read.

  Raises:
    DataError: a file is damaged or cut short, or a line holds no record, and skip_bad is False.
  """
  before = 0
  for path, name, kind, size in zip(stream.paths, stream.names, stream.kinds, stream.sizes, strict=True):
    try:
      inner = _file_documents(path, name, kind, stream, data, lambda at, start=before: on_place(start + at))  # type: ignore[misc]
      for item in inner:
        yield item and (item[0], _or_bad_item(item[1]))
    except DataError:
      if not data.skip_bad:
        raise
      yield None
    before += size
    on_place(before)


def _or_bad_item(blocks: Iterator[bytes]) -> Iterator[bytes]:
  """The blocks of a document; damage among them need not end the reading of other files."""
  try:
    yield from blocks
  except BadItem:
    raise
  except DataError as error:
    raise BadItem(str(error)) from error


def _file_documents(
  path: str, name: str, kind: str, stream: Stream, data: DataConfig, on_place: Callable[[int], None]
) -> Iterable[Item]:
  if kind == "lines":
    return _records(path, name, stream.field or "text", data.skip_bad, on_place)
  if kind == "parquet":
    return _rows(RecordTexts(Parquet([path], [name], stream.field or "text", data, path)))
  if kind == "unread":
    raise unread(path)
  if kind == "archive" or is_compressed(name):
    found = archives.documents(path, skip_bad=data.skip_bad, on_place=on_place)
    if len(stream.paths) == 1:
      return found
    return (item and (stem(name) if kind == "bytes" else f"{name}/{item[0]}", item[1]) for item in found)
  return [(name, _plain_blocks(path))]


def _plain_blocks(path: str) -> Iterator[bytes]:
  try:
    with open_file(path) as file:
      while block := file.read(_BLOCK):
        yield block
  except OSError as error:
    raise DataError(f"{path} {why_unreadable(path, error)}; skip such files with {SKIP_HINT}") from error


def _records(path: str, name: str, field: str, skip_bad: bool, on_place: Callable[[int], None]) -> Iterator[Item]:
  """The texts of a file of JSON Lines, compressed or not."""
  count = 0
  try:
    with open_file(path) as file:
      opened = decompressing(file, path) if is_compressed(path) else file
      for number, _, line, has_end in lines_of(opened, path):
        try:
          text = text_of(line, field)
        except BadRecord as error:
          if not skip_bad:
            raise bad_line(path, number, error, has_end) from error
          text = b""
        yield (f"{name}[{count}]", iter([text])) if text else None
        count += bool(text)
        on_place(file.tell())
  except ERRORS as error:
    raise DataError(f"{path} is damaged or cut short ({error}); get it anew") from error


def _rows(source: RecordTexts) -> Iterator[Item]:
  yield from [None] * source.skipped
  for i, length in enumerate(source.lengths):
    yield source.names[i], iter([source.read(i, 0, int(length)).tobytes()])
