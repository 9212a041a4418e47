"""Commands that results, design and the heads of files show: they are there and know each flag and config key shown.

None is run here; those of README.md and the other documents are, see test_documented_commands.py.
"""

import argparse
import ast
import functools
import importlib
import inspect
import re
import runpy
import shlex

import pytest
from run_commands import ROOT

from megabyte_jax.__main__ import COMMANDS as ALL
from megabyte_jax.commands.train import parse_arguments
from megabyte_jax.config import Config

LAUNCHER = r"(?:sbatch )?(?:--nodes=\d+ )?launch/(?:tpu_vm\.sh|tpu_pod\.sh|slurm\.sbatch|until_finished\.sh)(?= )"
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:python (?!-c )\S.*|launch/\S.*|sbatch .*)")


def head(path):
  """The docstring of a Python file; the first comment of another."""
  text = path.read_text()
  if path.suffix == ".py":
    return ast.get_docstring(ast.parse(text)) or ""
  lines = [line for line in text.splitlines() if not line.startswith("#!")]
  end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
  return "\n".join(line.removeprefix("#") for line in lines[:end])


def shown():
  """{command: the file that shows it}; a comment after two spaces is no part of it, nor are brackets."""
  texts = {name: (ROOT / name).read_text() for name in ("docs/results.md", "docs/design.md", "docs/plan_a_pod.md")}
  heads = [path for folder in ("launch", "configs", "benchmarks") for path in (ROOT / folder).glob("**/*")]
  texts |= {str(p.relative_to(ROOT)): head(p) for p in heads if p.suffix in (".py", ".sh", ".sbatch", ".yaml")}
  found = {}
  for name, text in texts.items():
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S) if name.endswith(".md") else [text]
    lines = [line for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    words = re.findall(r"`([^`]+)`", re.sub(r"```\w*\n.*?```", "", text, flags=re.S))
    for code in (*(re.split(r"  +(?!-)", line.strip())[0] for line in lines), *words):
      for command in re.split(r" && |;", " ".join(code.split())):
        if COMMAND.fullmatch(command):
          found[re.sub(r"[\[\]](?!\d|\.)", "", command)] = name
  return found


def words_of(command):
  """(script or command of the package, its arguments); a launcher's are train.py's."""
  words = shlex.split(re.sub(LAUNCHER, "python train.py", command))
  words = words[words.index("python") + 1 :]
  if words[0] == "-m":
    words = shlex.split(shlex.join(words[1:]).replace("megabyte_jax.", "megabyte_jax ", 1))[1:]  # the first spelling
  return words[0], words[1:]


@functools.cache
def known_flags(script):
  """Names, with underscores, of the flags of a command and of its parts."""
  names = set()

  class Parsed(Exception):
    pass

  def add(parser):
    names.update(option[2:].replace("-", "_") for option in parser._option_string_actions if option[2:])
    for action in parser._actions:
      if isinstance(action, argparse._SubParsersAction):
        for part in action.choices.values():
          add(part)

  def parse_args(parser, *_):
    add(parser)
    raise Parsed

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    if script.endswith(".py"):
      patch.syspath_prepend(str((ROOT / script).parent))
      found = runpy.run_path(str(ROOT / script), run_name="shown")
    else:
      found = vars(importlib.import_module(f"megabyte_jax.commands.{script}"))
    reads = found.get("parse_arguments") or found["main"]
    with pytest.raises(Parsed):
      reads(*[None] * len(inspect.signature(reads).parameters))
  return names


COMMANDS = shown()


def test_commands_are_found():
  files = set(COMMANDS.values())
  assert {"docs/results.md", "docs/design.md", "launch/slurm.sbatch", "configs/small.py"} <= files
  assert {"configs/paper/table5.py", "benchmarks/scaling.py"} <= files
  assert "workdir" in known_flags("train.py") & known_flags("eval.py")


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_there_and_knows_its_flags(command):
  script, arguments = words_of(command)
  assert script in ALL or (ROOT / script).is_file(), f"{COMMANDS[command]}: there is no {script}"
  flags = [word for word in arguments if re.match(r"--\w", word)]
  names = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags}
  unknown = {name for name in names if not name.startswith("config.")}
  unknown -= known_flags(script) if unknown else set()
  assert not unknown, f"{COMMANDS[command]}: {script} has no {unknown}"
  of_config = [flag for flag in flags if flag.startswith("--config") and "..." not in flag]
  if of_config:
    if not any(flag.startswith("--config=") for flag in of_config):
      of_config.insert(0, "--config=configs/quickstart.py")
    of_config = [re.sub("^--config=", f"--config={ROOT}/", flag) for flag in of_config]
    Config.from_dict(parse_arguments(of_config).config)


def test_flags_between_words_are_fields_of_the_config():
  """Such as `--config.accumulate=4`, whose values are read as train.py reads them."""
  tried = 0
  for document in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")):
    for code in re.findall(r"`(--config\.[^`]+)`", document.read_text()):
      flags = [flag for flag in shlex.split(code) if "=" in flag and not flag.endswith(".")]
      Config.from_dict(parse_arguments([f"--config={ROOT / 'configs/recipe.py'}", *flags]).config)
      tried += len(flags)
  assert tried > 10
