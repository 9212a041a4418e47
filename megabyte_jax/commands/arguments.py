"""Reads command lines: a mistake is one line, and flags that several commands share are defined here."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from megabyte_jax.config import overrides
from megabyte_jax.config.parsing import did_you_mean, wrong_type
from megabyte_jax.errors import FlagError, in_one_line
from megabyte_jax.files.inputs import waiting_is_said

_TYPES = {"int": int, "float": float}
path = overrides.expanded  # the type of every flag that names a path: `~` is the home folder, also after `=`


class Parser(argparse.ArgumentParser):
  """Parses as argparse does, but reports a mistake in one line, and takes --batch_size for --batch-size.

  `add_config` adds a flag that names a config file, whose values `--NAME.key=value` changes.

  Args:
    prog: the command as it is called, such as `python eval.py`.
    options: of argparse's own.
  """

  def __init__(self, prog: str, **options: Any):
    ours: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    super().__init__(prog, **ours | options)
    self._configs: list[str] = []
    self.register("type", int, _whole_number)

  def add_config(self, name: str, text: str, default: str | None = None) -> None:
    """Adds --NAME=FILE[:ROW], whose value is a locked ConfigDict; without a default it must be given."""
    self.add_argument(f"--{name}", default=default, metavar="FILE[:ROW]", help=text)
    self._configs.append(name)

  def parse_known_args(self, args=None, namespace=None):
    """Parses as argparse does, but refuses unknown flags here: a subcommand knows best which flags it has."""
    given, changes = self._split(sys.argv[1:] if args is None else args)
    self._check_given_once(given)
    found, unknown = super().parse_known_args(given, namespace)
    if unknown:
      flag = next((argument.partition("=")[0] for argument in unknown if argument.startswith("-")), "")
      called = flag.lstrip("-")
      near = did_you_mean(called, (option[2:] for option in self._option_string_actions if option[2:]), "--")
      near = near or next(filter(None, (self._near_key(called, name, found) for name in self._configs)), "")
      only_flags = all(action.option_strings for action in self._actions)
      hint = "; flags begin with --, and names with spaces are put in quotes" if only_flags else ""
      unexpected = f"unexpected {' '.join(unknown)}{hint}"
      self.error(f"unknown flag {flag}{near}" if flag else unexpected)
    files = {name: getattr(found, name) for name in self._configs}
    for name, file in files.items():
      if file is not None:
        setattr(found, name, self._load(name, file, changes[name]))
    for name, file in files.items():
      if file is None:
        self.error(f"--{name} is missing; give a config, such as configs/paper/table2.py:pg19_megabyte")
    return found, unknown

  def error(self, message: str) -> NoReturn:
    """Ends the command with exit code 2 and `message` in one line."""
    if match := re.fullmatch(r"argument (\S+): invalid (\w+) value: '(.*)'", message, re.DOTALL):
      name, kind, value = match.groups()
      message = wrong_type(name, _TYPES[kind], value) if kind in _TYPES else f"{name}: invalid value {value!r}"
    self._refuse(f"{message.removeprefix('argument ')} (see {self.prog} --help)")

  def _refuse(self, line: str) -> NoReturn:
    if in_notebook():  # where the end of the process would be a surprise
      raise FlagError(line)
    self.exit(2, f"error: {in_one_line(line)}\n")

  def _split(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, list[overrides.Override]]]:
    try:
      given, changes = overrides.split(arguments, self._configs)
    except FlagError as error:
      self._refuse(str(error))
    defined = {option.replace("_", "-"): option for option in self._option_string_actions}

    def as_defined(name: re.Match[str]) -> str:
      hyphens = name[0].replace("_", "-")
      return defined.get(hyphens, hyphens)

    end = given.index("--") if "--" in given else len(given)  # what follows are names
    return [re.sub(r"^--\w[\w-]*", as_defined, argument) for argument in given[:end]] + given[end:], changes

  def _load(self, name: str, file: str, changes: Sequence[overrides.Override]) -> Any:
    try:
      with waiting_is_said(path(file.partition(":")[0])):
        return overrides.load(f"--{name}", file, changes)
    except FlagError as error:
      self._refuse(str(error))

  def _near_key(self, flag: str, name: str, found: argparse.Namespace) -> str:
    """Returns `; did you mean --NAME.KEY?` where a key of the config `name` is nearly called as an unknown flag."""
    file = getattr(found, name)
    keys = overrides.keys(self._load(name, file, ())) if file else []
    by_end: dict[str, str] = {}
    for key in keys:  # a group before what is in it
      by_end.setdefault(key.removesuffix(".KEY").split(".")[-1], key)
    wanted = flag.replace("-", "_")
    begin = [end for end in by_end if end.startswith(wanted)]
    parts = [end for end in by_end if wanted in end.split("_")]
    close = [wanted] if wanted in by_end else begin or parts or difflib.get_close_matches(wanted, by_end, n=1)
    meant = by_end[close[0]].replace("data.KEY", "data.train") if close else ""  # as --data of eval.py
    return f"; did you mean --{name}.{meant}?" if close else ""

  def _check_given_once(self, arguments: Sequence[str]) -> None:
    """Refuses a second value of one flag; argparse would take the last without a word."""
    seen: dict[str, str] = {}
    for argument in arguments:
      if argument == "--":
        break
      flag = argument.partition("=")[0]
      action = self._option_string_actions.get(flag)
      if action is None or isinstance(action, argparse._AppendAction) or not flag.startswith("--"):
        continue
      if action.dest in seen:
        both = f"{seen[action.dest]} and {flag} are both given"
        self.error(f"{f'{flag} is given twice' if seen[action.dest] == flag else both}; leave one out")
      seen[action.dest] = flag


def _whole_number(text: str) -> int:
  number = int(text)
  if not -(2**63) <= number < 2**63:
    raise argparse.ArgumentTypeError(f"{text} is too large a number")
  return number


def called(command: str) -> str:
  """Returns this process's command as it was called: `python train.py`, `megabyte_jax train` or with python -m."""
  name = os.path.basename(sys.argv[0]).removesuffix(".exe")
  if name == f"{command}.py" and command in ("train", "eval"):
    return f"python {name}"
  return f"megabyte_jax {command}" if name == "megabyte_jax" else f"python -m megabyte_jax {command}"


def in_notebook() -> bool:
  """Returns whether IPython runs this program: there an ordinary exception is better than the end of the process."""
  get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
  return get_ipython is not None and get_ipython() is not None


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --workdir and --step: which run, and which of its checkpoints."""
  text = "the folder of a train.py run; default: runs/quickstart"
  parser.add_argument("--workdir", type=path, default="runs/quickstart", help=text)
  parser.add_argument("--step", type=step_argument, metavar="N|best", help="checkpoint; default: the newest")


def step_argument(text: str) -> int | Literal["best"]:
  """Returns the value of a command's --step: a number, or best."""
  if text == "best":
    return "best"
  try:
    return int(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor best") from error
