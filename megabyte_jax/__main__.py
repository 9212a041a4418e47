"""Runs a command: python -m megabyte_jax COMMAND, or megabyte_jax COMMAND once it is installed."""

from __future__ import annotations

import importlib
import sys

from megabyte_jax.commands import command_line
from megabyte_jax.config.parsing import did_you_mean

COMMANDS = ("train", "eval", "generate", "compress", "plan", "tables", "matching", "prepare", "export")


def describe() -> str:
  """Returns the usage and one line for each command: the first one of its module."""
  lines = ["usage: megabyte_jax COMMAND ...", "", "MEGABYTE in JAX; COMMAND --help tells more.", ""]
  for name in COMMANDS:
    text = importlib.import_module(f"megabyte_jax.commands.{name}").__doc__ or ""  # none under python -OO
    first, _, _ = text.partition("\n")
    lines.append(f"  {name:<10}{first}")
  return "\n".join(lines)


def main() -> None:
  """Runs the command that the first argument names, with all others."""
  name, *arguments = sys.argv[1:] or ["--help"]
  if name in COMMANDS:
    module = f"megabyte_jax.commands.{name}"
    command_line.run(lambda: importlib.import_module(module).main(arguments), outlive_readers=name == "train")
  elif name in ("-h", "--help", "help"):
    command_line.run(lambda: print(describe(), flush=True))
  else:
    near = did_you_mean(name, COMMANDS)
    known = f"{near} There" if near else "; there"
    print(f"error: there is no command {name!r}{known} are {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
