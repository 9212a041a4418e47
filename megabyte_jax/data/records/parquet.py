"""Reads one column of Parquet files at random, a row group at a time."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import fingerprint_files, open_file, sizes_of
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.records import cache
from megabyte_jax.data.records.columns import binary_column, byte_lengths, choose_field, import_arrow
from megabyte_jax.data.records.store import Numbered
from megabyte_jax.data.records.table_column import TableColumn
from megabyte_jax.data.shared_cache import SharedCache
from megabyte_jax.data.sources import NothingInside, first_names, nothing_in
from megabyte_jax.display.progress import Progress
from megabyte_jax.errors import ConfigError, DataError

_KEPT = 1 << 29  # bytes of decoded row groups kept at hand
_THREADS = 4  # of the first reading; each holds a row group
_SHOWN = 1 << 27  # bytes of a column from which on its first reading is shown


class Parquet(TableColumn):
  """The values of one column of Parquet files; a `RecordStore`.

  The lengths of texts are found by reading the column once; they are kept in the cache folder. Rows whose text is empty
  are left out and counted. A read decodes the row group that it falls into; half a gigabyte of them is kept.

  Args:
    paths, names: where the files are and what they are called.
    field: the column; '' as `choose_field` says.
    data: form, skip_bad and cache_dir.
    spec: the source, for errors.
    skip_empty: leave out and count files without a byte.

  Raises:
    ConfigError: there is no such column.
    DataError: a file is damaged; or a row has no value, and skip_bad is False; or no row has a text, `NothingInside`
      if there are no rows.
  """

  slow = True

  def __init__(
    self, paths: Sequence[str], names: Sequence[str], field: str, data: DataConfig, spec: str, skip_empty: bool = False
  ):
    self._module = import_arrow("pyarrow.parquet")
    self._paths, self._names = list[str](), list[str]()
    self._field, self._form, self._data = field, data.form, data
    failed = ""
    group_rows, lengths = [], []
    for path, name in zip(paths, names, strict=True):
      try:
        rows, sizes = self._index(path)
      except DataError as error:
        if not (data.skip_bad or (skip_empty and sizes_of([path]) == [0])):
          raise
        self.skipped, failed = self.skipped + 1, failed or str(error)
        continue
      self._paths.append(path)
      self._names.append(name)
      group_rows.append(rows)
      lengths.append(sizes)
    if not self._paths:
      kind = DataError if any(sizes_of(paths)) else NothingInside
      raise kind(f"none of {self.skipped:,} files of {spec} can be read: {failed}")
    self._groups = np.cumsum([len(rows) for rows in group_rows])  # row groups up to the end of each file
    self._group_ends = np.cumsum(np.concatenate(group_rows))  # rows up to the end of each row group, over all files
    self._rows = Numbered(self._names, [int(rows.sum()) for rows in group_rows])
    self._shown = first_names(self._paths, len(self._paths))
    if not len(self._rows):
      raise nothing_in(self._paths, "rows")
    if data.form == "bytes":
      self._choose_rows(np.concatenate(lengths), data.skip_bad)
    self._group = SharedCache(self._read_group, _KEPT, lambda values: values.nbytes)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the files (see `fingerprint_files`) and the column."""
    return combine_fingerprints([fingerprint_files(self._paths, self._names, sizes_of(self._paths)), self._field])

  def load(self, i: int) -> bytes:
    """Returns the value of record i; see `RecordStore`."""
    row = self._row(i)
    group = int(np.searchsorted(self._group_ends, row, side="right"))
    first = int(self._group_ends[group - 1]) if group else 0
    values = self._group(group)
    if len(values) <= row - first:
      raise DataError(f"{self.place(i)} is no longer there; the file has changed since the data were opened")
    value = values[row - first].as_py()
    if value is None:
      raise self._no_value(row)
    return value

  def _place_of_row(self, row: int) -> str:
    file, number = self._rows.find(row)
    return f"{self._paths[file]}, row {number}"

  def _read_group(self, group: int) -> Any:
    file = int(np.searchsorted(self._groups, group, side="right"))
    number = group - (int(self._groups[file - 1]) if file else 0)
    return self._values(self._paths[file], number)

  def _values(self, path: str, number: int) -> Any:
    """The column in one row group of a file. Raises DataError naming the file where it is damaged."""
    try:
      with open_file(path) as file:
        opened = self._module.ParquetFile(file, page_checksum_verification=True)
        return binary_column(opened.read_row_group(number, columns=[self._field], use_threads=False).column(0))
    except ConfigError:
      raise
    except Exception as error:  # Arrow's, of damaged files of all kinds
      raise DataError(f"{path}, row group {number} is damaged or cut short ({_said(error)}); get it anew") from error

  def _index(self, path: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows of each row group, byte lengths of all rows where the form is bytes) of a file."""
    if self._form != "bytes":
      return self._row_groups(path), np.zeros(0, np.int64)
    folder = os.path.join(cache.cache_folder(self._data.cache_dir), "indexes")
    field = self._field or "text"
    belongs_to = cache.identity(path) | {"field": field, "kind": "parquet"}
    name = cache.entry_name(belongs_to["path"], field, "parquet")
    kept = os.path.join(folder, f"{name}.index")
    if not (found := cache.load_index(kept, belongs_to)):
      with cache.held_if_writable(folder, name):
        if not (found := cache.load_index(kept, belongs_to)):
          rows = self._row_groups(path)
          found = {"rows": rows, "sizes": self._scan(path, rows)}, {}
          cache.save_index(kept, belongs_to, *found)
    self._field = field
    return found[0]["rows"], found[0]["sizes"]

  def _row_groups(self, path: str) -> np.ndarray:
    """Rows of each row group of a file, whose column is there; int64."""
    try:
      with open_file(path) as file:
        opened = self._module.ParquetFile(file)
        schema, metadata = opened.schema_arrow, opened.metadata
        twice = sorted(name for name, count in Counter(schema.names).items() if count > 1)
        if self._field in twice or (not self._field and twice):
          raise ConfigError(f"{path} has several columns called {(self._field or twice[0])!r}; rename all but one")
        types = {name: schema.field(name).type for name in schema.names if name not in twice}
        rows = np.array([metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)], np.int64)
        if len(rows) and (rows.min() < 0 or rows.sum() != metadata.num_rows):
          raise ValueError("its row groups do not add up")
    except ConfigError:
      raise
    except Exception as error:  # see _values
      raise DataError(f"{path} is not a whole Parquet file ({_said(error)}); get it anew") from error
    self._field = choose_field(path, types, self._field, self._form)
    return rows

  def _scan(self, path: str, rows: np.ndarray) -> np.ndarray:
    """Byte lengths of all values of a file, found by reading the column once."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    found: list[np.ndarray] = []
    with Progress(f"indexing {path}", enabled=size > _SHOWN) as progress:
      for number, lengths in enumerate(self._all_lengths(path, len(rows))):
        if len(lengths) != rows[number]:
          raise DataError(f"{path}, row group {number} holds {len(lengths)} rows instead of {rows[number]}")
        found.append(lengths)
        progress.add(int(np.maximum(lengths, 0).sum()))
    return np.concatenate([np.zeros(0, np.int64), *found])

  def _all_lengths(self, path: str, count: int) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(_THREADS) as pool:
      for first in range(0, count, _THREADS):
        numbers = range(first, min(count, first + _THREADS))
        yield from pool.map(lambda number: byte_lengths(self._values(path, number)), numbers)


def _said(error: Exception) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__
