"""Picks the field of a table that is read, and takes its values out of Arrow columns."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from megabyte_jax.errors import ConfigError, DataError

_DEFAULTS = {"bytes": "text", "image": "image", "audio": "audio"}  # field by form, unless #FIELD names another


def import_arrow(name: str) -> Any:
  """Returns a module of pyarrow. Raises DataError with the command that installs it where it is missing."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise DataError('Parquet files need pyarrow, which is not installed: pip install -e ".[records]"') from error


def choose_field(spec: str, types: Mapping[str, Any], field: str, form: str) -> str:
  """Returns the column to read.

  Args:
    spec: the source, for errors.
    types: Arrow types by column.
    field: what the source names; '' takes text, image or audio, or the only column that fits.
    form: config.data.form.

  Raises:
    ConfigError: there is no such column, it does not hold what `form` reads, or it is not clear which to take.
  """
  fitting = [name for name, kind in types.items() if _fits(kind, form)]
  what = "text" if form == "bytes" else f"encoded {form}s"
  if field and field not in types:
    raise ConfigError(f"{spec} has no field {field!r}; its fields: {', '.join(types)}")
  if field and field not in fitting:
    raise ConfigError(f"{spec}: field {field!r} is {types[field]} and holds no {what} (config.data.form={form})")
  if field:
    return field
  if _DEFAULTS[form] in fitting:
    return _DEFAULTS[form]
  if len(fitting) == 1 and form != "bytes":
    return fitting[0]
  raise ConfigError(
    f"{spec} has no field {_DEFAULTS[form]!r} with {what}; its fields: {', '.join(types)}; name one by adding #FIELD"
  )


def _fits(kind: Any, form: str) -> bool:
  arrow = import_arrow("pyarrow.types")
  if arrow.is_dictionary(kind):
    kind = kind.value_type
  if arrow.is_struct(kind):  # as Hugging Face's data sets store images and recordings
    return form != "bytes" and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
  is_binary = any(getattr(arrow, f"is_{name}")(kind) for name in ("binary", "large_binary", "binary_view"))
  is_text = any(getattr(arrow, f"is_{name}")(kind) for name in ("string", "large_string", "string_view"))
  return is_binary or (is_text and form == "bytes")


def binary_column(column: Any) -> Any:
  """Returns the values of a text, binary or {bytes, path} column as one Arrow array of large_binary; nulls stay."""
  arrow, compute = import_arrow("pyarrow"), import_arrow("pyarrow.compute")
  if arrow.types.is_struct(column.type):
    column = compute.struct_field(column, "bytes")
  if arrow.types.is_dictionary(column.type):
    column = compute.cast(column, column.type.value_type)
  column = compute.cast(column, arrow.large_binary())
  return column.combine_chunks() if isinstance(column, arrow.ChunkedArray) else column


def byte_lengths(values: Any) -> np.ndarray:
  """Returns the length of each value of a `binary_column`, int64; -1 where it is null."""
  compute = import_arrow("pyarrow.compute")
  return compute.fill_null(compute.binary_length(values), -1).to_numpy(zero_copy_only=False).astype(np.int64)
