"""Makes dataclasses from nested mappings and back, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from megabyte_jax.errors import require

if TYPE_CHECKING:
  from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_IN_WORDS = {
  int: "a whole number",
  float: "a number",
  bool: "True or False",
  str: "text",
  tuple: "a tuple like (1, 2)",
}


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
  """Returns `; did you mean NEAREST?`, with `prefix` before the name, or '' where no known name comes near."""
  close = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {prefix}{close[0]}?" if close else ""


def require_known(what: str, name: str, known: Iterable[str]) -> None:
  """Raises `ConfigError` unless `name` is known: there is no `what`, which one may be meant, and which there are."""
  names = list(known)
  near = did_you_mean(name, names)
  require(name in names, f"there is no {what}{f'{near} All are' if near else '; choose one of'} {', '.join(names)}")


def attribute_texts(cls: type) -> dict[str, str]:
  """Returns what the docstring of a class says of its attributes, each in one line; nothing under python -OO."""
  section = (inspect.getdoc(cls) or "").partition("Attributes:")[2].partition("\n\n")[0]
  found: dict[str, str] = {}
  for entry in re.split(r"\n  (?! )", section)[1:]:
    names, _, text = entry.partition(": ")
    found |= dict.fromkeys(names.split(", "), " ".join(text.split()).removesuffix("."))
  return found


def wrong_type(name: str, wanted: type, value: object) -> str:
  """Returns the message for a value of another type than its key or flag takes."""
  return f"{name} must be {_IN_WORDS.get(wanted, wanted.__name__)}, not {value!r}"


def dataclass_from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
  """Builds dataclass `cls` from `values`, recursively; `where` is the key path for error messages.

  Raises:
    ConfigError: a key is unknown or missing, or a value has the wrong type.
  """
  require(hasattr(values, "items"), f"{where} must be a group of keys, not {values!r}")
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for key in values:
    hint = did_you_mean(str(key), fields, f"{where}.") or f"; known keys: {', '.join(fields)}"
    require(key in fields, f"unknown key {where}.{key}{hint}")
  for name, field in fields.items():
    optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    require(name in values or optional, f"{where}.{name} is missing")
  return cls(**{key: _convert(values[key], hints[key], f"{where}.{key}") for key in values})


def convert_fields(config: DataclassInstance) -> None:
  """Converts the fields of a frozen dataclass, made in Python, to their annotated types.

  Lists become tuples and numbers of NumPy's Python's, so that a config can be hashed, compared and saved.

  Raises:
    ConfigError: a field has a value of another type.
  """
  for name, hint in _hints(type(config)).items():
    value = getattr(config, name)
    object.__setattr__(config, name, _convert(value, hint, f"{type(config).__name__}.{name}"))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert(value: Any, hint: Any, where: str) -> Any:
  """`value` as the annotated type `hint`."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if isinstance(value, np.generic) or (getattr(value, "ndim", None) == 0 and hasattr(value, "item")):
    value = value.item()
  if types.NoneType in args:
    if value is None:
      return None
    args = tuple(arg for arg in args if arg is not types.NoneType)
    if len(args) == 1:
      return _convert(value, args[0], where)
  if origin is typing.Literal:
    require(value in args, f"{where} is {value!r}; choose one of {', '.join(map(repr, args))}")
    return value
  if inspect.isabstract(hint) and isinstance(value, hint):
    return value
  if inspect.isabstract(hint):  # `ModelConfig`, whose subclasses are told apart by their field `family`
    families = {typing.get_args(typing.get_type_hints(cls)["family"])[0]: cls for cls in hint.__subclasses__()}
    require(hasattr(value, "items"), f"{where} must be a group of keys, not {value!r}")
    family = value.get("family", hint.default_family)
    require(family in families, f"{where}.family is {family!r}; choose one of {', '.join(map(repr, families))}")
    return _convert(value, families[family], where)
  if origin is tuple:
    sequence = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    require(sequence, f"{where} must be a tuple, not {value!r}")
    return tuple(_convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    return dataclass_from_mapping(hint, value, where)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  exact = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
  require(exact, wrong_type(where, hint, value))
  return value


def mapping_from_dataclass(value: Any, leaf: Callable[[dict], Any] = dict) -> Any:
  """Inverts `dataclass_from_mapping`: nested `leaf` mappings; tuples of dataclasses become tuples of mappings."""
  if dataclasses.is_dataclass(value):
    fields = dataclasses.fields(value)
    return leaf({field.name: mapping_from_dataclass(getattr(value, field.name), leaf) for field in fields})
  if isinstance(value, tuple):
    return tuple(mapping_from_dataclass(item, leaf) for item in value)
  return value
