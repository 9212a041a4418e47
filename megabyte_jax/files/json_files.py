"""Reads JSON that somebody may have edited or damaged; whatever is wrong with it is one line."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from megabyte_jax.errors import UserError
from megabyte_jax.files.inputs import check_readable, waiting_is_said
from megabyte_jax.files.object_stores import is_remote

_DEPTH = 64  # of nested objects and lists; no file of ours comes near


def read_json(path: epath.PathLike, kind: type[UserError], remedy: str) -> dict[str, Any]:
  """Reads the JSON object in a file.

  Args:
    path: of the file, local or in a bucket.
    kind: of the error where the file holds anything else.
    remedy: what to do then, such as "restore it from a copy"; ends the message.

  Raises:
    kind: see `parse_json`.
    OSError: the file cannot be read; FileNotFoundError where there is none.
  """
  path = epath.Path(path)
  if is_remote(path):
    return parse_json(path.read_bytes(), str(path), kind, remedy)
  check_readable(str(path), kind)
  with waiting_is_said(str(path)):
    data = path.read_bytes()
  return parse_json(data, str(path), kind, remedy)


def parse_json(data: bytes, name: str, kind: type[UserError], remedy: str) -> dict[str, Any]:
  """Parses the JSON object in `data`, UTF-8.

  Args:
    data: what should be a single JSON object.
    name: of the file or part of a file that `data` is, for the message.
    kind, remedy: as for `read_json`.

  Raises:
    kind: `data` are not UTF-8, not JSON, nested too deeply, no object, or name a key twice.
  """
  problem = ""
  try:
    value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_refuse_constant)
  except UnicodeDecodeError as error:
    problem = f"is not JSON: byte {error.start:,} is not UTF-8"
  except RecursionError:
    problem = "is not JSON as we write it: nested too deeply"
  except ValueError as error:  # JSONDecodeError, a number of thousands of digits, and what the hooks below say
    problem = f"is not JSON: {error}"
  else:
    if not isinstance(value, dict):
      problem = f"is not a JSON object but a {type(value).__name__}"
    elif _is_deep(value):
      problem = "is not JSON as we write it: nested too deeply"
  if problem:
    raise kind(f"{name} {problem}; {remedy}")
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values: dict[str, Any] = {}
  for name, value in pairs:
    if name in values:
      raise ValueError(f"the key {name!r} is there twice")
    values[name] = value
  return values


def _refuse_constant(name: str) -> Any:
  raise ValueError(f"{name} is not a number in JSON")


def _is_deep(value: Any) -> bool:
  """Returns True if lists and objects are nested deeper than any file of ours."""
  layer = [value]
  for _ in range(_DEPTH):
    inner = [child for outer in layer for child in (outer.values() if isinstance(outer, dict) else outer)]
    layer = [child for child in inner if isinstance(child, (dict, list))]
    if not layer:
      return False
  return True
