"""Reads config files and what a command line changes of them: --config=FILE[:ROW] --config.key.sub[0].name=value."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import glob
import inspect
import os
import pathlib
import re
import stat
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from megabyte_jax.config.parsing import did_you_mean, wrong_type
from megabyte_jax.config.shipped import shipped
from megabyte_jax.errors import FlagError, UserError

_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Override:
  """One change of a config.

  Attributes:
    written: the flag as it was given, such as `--config.mesh.data=3`.
    key: the key that it names, below the config: `mesh.data`.
    value: its value as text; None where there is none.
    negated: True for `--noconfig.key`.
  """

  written: str
  key: str
  value: str | None
  negated: bool = False

  @property
  def flag(self) -> str:
    """The flag without its value."""
    return self.written.partition("=")[0]


def split(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[Override]]]:
  """Separates the overrides of the config flags `names` from all other arguments.

  Returns:
    The other arguments, and the overrides of each config flag, in order.

  Raises:
    FlagError: an override stands before the file that it changes, or is given twice.
  """
  rest: list[str] = []
  changes: dict[str, list[Override]] = {name: [] for name in names}
  form = re.compile(rf"--?(no)?({'|'.join(names)})\.([^=]+)(?:=(.*))?", re.DOTALL)
  waiting = list(arguments)
  while waiting:
    argument = waiting.pop(0)
    match = form.fullmatch(argument) if names else None
    if not match:
      rest.append(argument)
      continue
    no, name, key, value = match.groups()
    if any(re.match(rf"--{name}(=|$)", later) for later in waiting):
      raise FlagError(f"{argument} in argv before a value for --{name}; give --{name}=FILE first")
    if any(change.key == key for change in changes[name]):
      raise FlagError(f"--{name}.{key} is given twice; leave one out")
    if value is None and not no and waiting and not waiting[0].startswith("--"):
      value = waiting.pop(0)
    changes[name].append(Override(argument, key, value, bool(no)))
  return rest, changes


def load(flag: str, reference: str, changes: Sequence[Override] = ()) -> ConfigDict:
  """Returns what get_config() of a config file returns, with some values changed.

  Args:
    flag: the flag that names the file, for messages: `--config`.
    reference: FILE, or FILE:ROW to call get_config(ROW). A relative path that does not exist here is looked for beside
      train.py, so that `configs/quickstart.py` is found from anywhere.
    changes: applied in this order.

  Raises:
    FlagError: no such file, row or key exists, the file is not Python or has no config, or a value has the wrong type.
  """
  path, colon, row = reference.partition(":")
  config = _call(flag, reference, _module(flag, path), [row] if colon else [])
  for number, change in enumerate(changes):
    for before in changes[:number]:
      if before.key.startswith((change.key + ".", change.key + "[")):
        raise FlagError(f"{change.flag} is given after {before.flag}, which it would undo; give it first")
    _apply(config, change)
  return config


def keys(config: ConfigDict) -> list[str]:
  """Returns all dotted keys of a config, groups before what is in them; a group's ends with KEY: `data.KEY`."""
  found = [f"{name}.KEY" if isinstance(value, ConfigDict) else name for name, value in config.items()]
  for name, value in config.items():
    found += [f"{name}.{key}" for key in keys(value)] if isinstance(value, ConfigDict) else []
  return found


def expanded(text: str) -> str:
  """Replaces `~` and `~name`, where comma-separated paths begin with them, by home folders."""
  return re.sub(r"(^|,)(~[^/,]*)", lambda found: found[1] + os.path.expanduser(found[2]), text)


def _module(flag: str, path: str) -> types.ModuleType:
  """The config file as a module."""
  if not path:
    raise FlagError(f"{flag}: the path of the config file is an empty string")
  file = pathlib.Path(expanded(path))
  if not file.exists() and not file.is_absolute() and shipped(path).exists():
    file = shipped(path)
  if file.suffix == ".json":
    raise FlagError(
      f"{flag}: {path!r} is not Python; a run's config.json is continued by the command that began the run"
    )
  try:
    if stat.S_IFMT(file.stat().st_mode) in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK):
      raise FlagError(f"{flag}: {path!r} is a device; name a config file")
    source = file.read_bytes()
    name = str(file) if file.is_file() else f"<{file}>"  # a pipe must not be opened again, by a traceback for one
    code = compile(source, name, "exec")
  except OSError as error:
    raise FlagError(f"{flag}: {error.strerror}: {path!r}{_near_file(path)}") from error
  except SyntaxError as error:
    raise FlagError(f"{flag}: {path}, line {error.lineno}: {error.msg}") from error
  except ValueError as error:  # null bytes, which later Pythons call a SyntaxError
    raise FlagError(f"{flag}: {path}: {error}") from error
  module = types.ModuleType(f"{flag.lstrip('-')}_config")
  module.__file__ = name
  sys.modules[module.__name__] = module  # where dataclasses look for the types of their fields
  with _ErrorsOf(flag, name):
    exec(code, module.__dict__)
  return module


def _near_file(path: str) -> str:
  """Returns `; did you mean FILE?` for a config file beside `path`; for a name alone, for one in configs/."""
  if folder := os.path.dirname(path):
    return did_you_mean(path, glob.glob(os.path.join(folder, "*.py")))
  root = shipped("configs").parent
  there = sorted(str(file.relative_to(root)) for file in (root / "configs").rglob("*.py"))
  by_name = {os.path.basename(file).removesuffix(".py"): file for file in there}
  close = difflib.get_close_matches(path.removesuffix(".py"), by_name, n=1)
  return f"; did you mean {by_name[close[0]]}?" if close else ""


def _call(flag: str, reference: str, module: types.ModuleType, row: list[str]) -> ConfigDict:
  """Returns what the module's get_config() returns."""
  get_config = getattr(module, "get_config", None)
  if get_config is None:
    raise FlagError(
      f"{flag}: module {module.__file__!r} has no attribute 'get_config'; a config file has a function get_config()"
    )
  if row and not inspect.signature(get_config).parameters:
    raise FlagError("this config file has one config: leave out the colon after its name, and what follows")
  with _ErrorsOf(flag, str(module.__file__)):
    config = get_config(*row)
  if isinstance(config, dict):
    config = ConfigDict(config)
  if not isinstance(config, ConfigDict):
    raise FlagError(f"get_config() of {reference} must return Config(...).to_config_dict()")
  return config.lock()


class _ErrorsOf:
  """Makes one line of errors that a config file raises; a bug such as an unknown attribute keeps its traceback."""

  def __init__(self, flag: str, path: str):
    self._flag, self._path = flag, path

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind: object, error: BaseException | None, trace: types.TracebackType | None) -> None:
    if isinstance(error, UserError):
      raise FlagError(str(error)) from error  # says itself where to look
    if isinstance(error, SyntaxError):  # in a module that the file imports
      raise FlagError(f"{self._flag}: {error.filename}, line {error.lineno}: {error.msg}") from error
    if isinstance(error, (TypeError, ValueError, OSError)):
      lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == self._path]
      where = f" ({self._path}{f', line {lines[-1]}' if lines else ''})"
      raise FlagError(" ".join(str(error).split()) + where) from error


def _apply(config: ConfigDict, change: Override) -> None:
  """Changes one value in place."""
  if not re.fullmatch(r"\w+(\.\w+|\[-?\d+\])*", change.key):
    raise FlagError(f"{change.written} names no key; write such as --config.model.levels[0].num_layers=3")
  parts = [int(i) if i else name for i, name in re.findall(r"\[(-?\d+)\]|(\w+)", change.key)]
  holder: Any = config
  for part in parts[:-1]:
    holder = _item(holder, part, change, config)
  current = _item(holder, parts[-1], change, config)
  if isinstance(holder, tuple):
    raise FlagError(f"{change.written}: one element cannot be replaced; give the whole tuple")
  holder[parts[-1]] = _value(change, current)


def _item(holder: Any, part: int | str, change: Override, config: ConfigDict) -> Any:
  """Returns what the holder has under a key or at an index."""
  known = list(holder) if isinstance(holder, (ConfigDict, dict)) else []
  if isinstance(part, str) and part in known:
    return holder[part]
  if isinstance(part, int) and isinstance(holder, (tuple, list)) and -len(holder) <= part < len(holder):
    return holder[part]
  near = _elsewhere(part, change, config) or did_you_mean(str(part), known, change.flag.partition(f".{part}")[0] + ".")
  if not near and isinstance(holder, (tuple, list)):
    near = f"; there are [0] to [{len(holder) - 1}]"
  elif not near:
    shown = f".{part}" if isinstance(part, str) else f"[{part}]"
    near = f"; there are {', '.join(known)}" if known else f"; before {shown} stands a value, which has no keys"
  raise FlagError(f"there is no such key: {change.written}{near}")


def _elsewhere(part: int | str, change: Override, config: ConfigDict) -> str:
  """Returns `; did you mean FLAG?` for the keys of other groups that are called as the one that is not there."""
  before, _, behind = change.flag.partition(f".{part}")
  start = before.partition(".")[0]
  same = [key for key in (key.removesuffix(".KEY") for key in keys(config)) if key.rpartition(".")[2] == part]
  flags = [f"{start}.{key}{behind}" for key in same]
  return f"; did you mean {' or '.join(flags)}?" if flags else ""


def _value(change: Override, current: Any) -> Any:
  """The override's text as a value of the current one's type."""
  text, wanted = change.value, type(current)
  if wanted is bool and (change.negated or text is None):
    if text is not None:
      raise FlagError(f"{change.written}: a flag that begins with --no takes no value")
    return not change.negated
  if change.negated:
    raise FlagError(f"{change.written}: only what is True or False can be given as --no...; write {change.key}=VALUE")
  if text is None:
    raise FlagError(f"Missing value for flag {change.flag}; write {change.flag}=VALUE")
  try:
    if wanted is bool:
      return _BOOLEANS[text.lower()]
    if wanted is int:
      number = int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
      if not -(2**63) <= number < 2**63:
        raise FlagError(f"{change.flag}: {text} is too large a number")
      return number
    if wanted is float:
      return float(text)
    if wanted is str:
      return expanded(text)
    if wanted in (tuple, list):
      return wanted(_elements(text))
    value = ast.literal_eval(text)
    if wanted is ConfigDict and not isinstance(value, dict):
      raise ValueError("no group of keys")
    return ConfigDict(value) if wanted is ConfigDict else value
  except FlagError:
    raise
  except (KeyError, ValueError, SyntaxError, TypeError) as error:
    if wanted is ConfigDict:
      raise FlagError(f"{change.flag} must be a group of keys such as {{'data': 1}}, not {text!r}") from error
    raise FlagError(wrong_type(change.flag, wanted, text)) from error


def _elements(text: str) -> Sequence[Any]:
  """The elements of a tuple: `(1, 2)`, `1,2`, or one, which may be a word without quotes."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    if "," in text or " " in text:
      raise
    value = text
  return value if isinstance(value, (tuple, list)) else (value,)
