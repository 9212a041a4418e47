"""Reads data sets of Hugging Face's package `datasets`: of the hub, of its cache, or saved by save_to_disk."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from megabyte_jax.config import DataConfig
from megabyte_jax.data.fingerprints import combine_fingerprints, hash_values
from megabyte_jax.data.records.columns import binary_column, byte_lengths, choose_field
from megabyte_jax.data.records.store import Numbered
from megabyte_jax.data.records.table_column import TableColumn
from megabyte_jax.data.sources import evenly_spaced
from megabyte_jax.errors import ConfigError, DataError

_PART = r"[\w.-]+(?:\[[^\]]*\])?"
_SPEC = re.compile(rf"hf:(?P<name>[^#]+?)(?::(?P<split>{_PART}(?:\+{_PART})*))?(?:#(?P<field>.+))?")
_BATCH = 10_000  # rows whose lengths are taken at once
_SAMPLED = 1024  # rows whose values a fingerprint looks at


def is_saved(folder: str) -> bool:
  """Tells whether a local folder was made by save_to_disk."""
  return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")) and (
    os.path.isfile(os.path.join(folder, "dataset_dict.json"))
    or os.path.isfile(os.path.join(folder, "dataset_info.json"))
  )


class HuggingFace(TableColumn):
  """One column of a data set that the package `datasets` reads; a `RecordStore`.

  Args:
    spec: hf:NAME:SPLIT, hf:NAME/CONFIG:SPLIT or hf:FOLDER:SPLIT, with #FIELD if need be; SPLIT may be a part, such as
      train[:10%]. A single table that was saved without the name of its split counts as train.
    data: form and skip_bad.

  Raises:
    ConfigError: the name cannot be understood; no such split or column.
    DataError: there is no such data set, it cannot be fetched, or the package is missing; a row has no value, and
      skip_bad is False.
  """

  slow = True

  def __init__(self, spec: str, data: DataConfig):
    match = _SPEC.fullmatch(spec)
    if match is None:
      raise ConfigError(f"data source {spec!r} names no data set; write it like hf:NAME:train or hf:NAME/CONFIG:train")
    self._shown = spec
    table = _open(spec, match["name"], match["split"] or "")
    types = {name: table.features.arrow_schema.field(name).type for name in table.column_names}
    self._field = choose_field(spec, types, match["field"] or "", data.form)
    self._table = table.select_columns([self._field]).with_format("arrow")
    self._rows = Numbered([spec], [len(table)])
    if not len(table):
      raise DataError(f"{spec} has no rows; name another split, or a larger part of it")
    if data.form == "bytes":
      self._choose_rows(np.concatenate(list(self._lengths())), data.skip_bad)

  def _lengths(self) -> Iterator[np.ndarray]:
    for batch in self._table.iter(_BATCH):
      yield byte_lengths(binary_column(batch.column(0)))

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the number of rows, the column, all lengths of texts, and 1,024 evenly spaced values."""
    count = len(self.names)
    values = map(self._value_or_nothing, evenly_spaced(count, _SAMPLED))
    return combine_fingerprints([hash_values([self._sizes.tobytes(), *values]), str(count), self._field])

  def _value_or_nothing(self, i: int) -> bytes:
    try:
      return self.load(i)
    except DataError:  # one that is skipped; others are reported when they are read
      return b""

  def load(self, i: int) -> bytes:
    """Returns the value of record i; see `RecordStore`."""
    row = self._row(i)
    try:
      column = self._table[row : row + 1].column(0)
      value = binary_column(column)[0].as_py()
      if value is None and hasattr(column.type, "num_fields"):  # an image or a recording that lies elsewhere
        path = (column[0].as_py() or {}).get("path")
        if path:
          with open(path, "rb") as file:
            return file.read()
    except DataError:
      raise
    except Exception as error:  # Arrow's and those of `datasets`
      raise DataError(f"{self._rows[row]} cannot be read ({' '.join(str(error).split())[:200]})") from error
    if value is None:
      raise self._no_value(row)
    return value


def _open(spec: str, name: str, split: str) -> Any:
  """The table of one split. See `HuggingFace` for what is raised."""
  try:
    import datasets  # noqa: PLC0415
  except ImportError as error:
    raise DataError('hf: sources need datasets, which is not installed: pip install -e ".[hf]"') from error
  try:
    folder = os.path.expanduser(name)
    if os.path.isdir(folder) and is_saved(folder):
      return _part(datasets, spec, datasets.load_from_disk(folder), split)
    if not split:
      raise ConfigError(f"data source {spec!r} names no split; write it like hf:{name}:train")
    return _load(datasets, folder if os.path.isdir(folder) else name, split)
  except (ConfigError, DataError):
    raise
  except Exception as error:  # of the hub, of Arrow, of scripts and builders
    said = " ".join(str(error).split())[:300] or type(error).__name__
    raise DataError(f"{spec} cannot be opened: {said}") from error


def _load(datasets: Any, name: str, split: str) -> Any:
  """Returns what load_dataset gives for NAME or NAME/CONFIG; the hub's own names may have one slash."""
  base, _, config = name.rpartition("/")
  tries: list[tuple[str, str | None]] = [(name, None), *([(base, config)] if base and not os.path.isdir(name) else [])]
  if name.count("/") > 1 and not os.path.isdir(name):
    tries.reverse()
  first: Exception | None = None
  for path, part in tries:
    try:
      return datasets.load_dataset(path, part, split=split)
    except (FileNotFoundError, ConnectionError) as error:  # DatasetNotFoundError is the former
      first = first or error
    except ValueError as error:
      if "Unknown split" in str(error) or "BuilderConfig" in str(error) or "Config name is missing" in str(error):
        raise
      first = first or error
  assert first
  raise first


def _part(datasets: Any, spec: str, saved: Any, split: str) -> Any:
  """A split, or a part of one, of what was saved by save_to_disk."""
  there = ""
  if not isinstance(saved, dict):
    name = str(saved.split or "train")  # what `datasets` calls the rows of files that belong to no split
    if split in ("", name):
      return saved
    saved, there = {name: saved}, f"there is {name} alone; without a split the whole table is read"
  if not split:
    raise ConfigError(f"data source {spec!r} names no split; there are {', '.join(saved)}: hf:FOLDER:SPLIT")
  for part in split.split("+"):
    if part.partition("[")[0] not in saved:
      there = there or f"there are {', '.join(saved)}"
      raise ConfigError(f"{spec}: there is no split {part.partition('[')[0]!r}; {there}")
  lengths = {name: len(table) for name, table in saved.items()}
  read = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
  parts = [saved[part.splitname].select(range(part.from_, part.to)) for part in read]
  return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
