"""Command lines read by argparse: what is wrong with one is one line; flags that several commands have."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from megabyte_jax.config.parsing import did_you_mean, wrong_type

_TYPES = {"int": int, "float": float}


class Parser(argparse.ArgumentParser):
  """argparse's, for which what is wrong is one line, and --batch_size is --batch-size, as in absl's commands.

  Args:
    prog: the command as it is called, such as `python eval.py`.
    options: of argparse's own.
  """

  def __init__(self, prog: str, **options: Any):
    super().__init__(prog, **{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

  def parse_known_args(self, args=None, namespace=None):
    """As argparse's, but what is not known is refused here: a subcommand knows best which flags it has."""
    found, unknown = super().parse_known_args(_with_hyphens(args), namespace)
    if unknown:
      flag = next((argument.partition("=")[0] for argument in unknown if argument.startswith("-")), "")
      near = did_you_mean(flag[2:], (option[2:] for option in self._option_string_actions if option[2:]), "--")
      self.error(f"unknown flag {flag}{near}" if flag else f"unexpected {' '.join(unknown)}")
    return found, unknown

  def error(self, message: str) -> NoReturn:
    """Ends the process with `message` in one line and exit code 2."""
    if match := re.fullmatch(r"argument (\S+): invalid (\w+) value: '(.*)'", message):
      name, kind, value = match.groups()
      message = wrong_type(name, _TYPES[kind], value) if kind in _TYPES else f"{name}: invalid value {value!r}"
    self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _with_hyphens(arguments: Sequence[str] | None) -> list[str]:
  given = sys.argv[1:] if arguments is None else arguments
  return [re.sub(r"^--\w+", lambda name: name[0].replace("_", "-"), argument) for argument in given]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
  """--workdir and --step: which run, and which of its checkpoints."""
  parser.add_argument("--workdir", default="runs/quickstart", help="the folder of a train.py run")
  parser.add_argument("--step", type=step_argument, metavar="N|best", help="checkpoint; default: the newest")


def step_argument(text: str) -> int | Literal["best"]:
  """The value of a command's --step: a number, or best."""
  if text == "best":
    return "best"
  try:
    return int(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor best") from error
