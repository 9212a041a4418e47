"""python -m megabyte_jax: which commands there are, their help without JAX, and flags that all of them read alike."""

import shlex
import subprocess
import sys

import pytest
from run_commands import ROOT, environment

from megabyte_jax import __main__ as package
from megabyte_jax.commands import arguments, command_line, compress, generate, plan, prepare, tables, train
from megabyte_jax.commands import eval as evaluation
from megabyte_jax.config import DataConfig
from megabyte_jax.errors import FlagError
from megabyte_jax.evaluation.report import what_next


def test_commands_are_listed_with_one_line_each(monkeypatch, capsys):
  for flags in ([], ["--help"], ["help"]):
    monkeypatch.setattr(sys, "argv", ["megabyte_jax", *flags])
    package.main()
    said = capsys.readouterr().out
    for name in package.COMMANDS:
      [line] = [line for line in said.splitlines() if line.startswith(f"  {name} ")]
      assert len(line) < 130 and line.endswith(".")
  assert {path.stem for path in (ROOT / "megabyte_jax/commands").glob("*.py")} - set(package.COMMANDS) == {
    "__init__",
    "arguments",
    "command_line",
    "scripts",
    "stopping",
    "strict_settings",
  }


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean train? There"), ("x", "there")])
def test_an_unknown_command_is_one_line(monkeypatch, capsys, name, hint):
  monkeypatch.setattr(sys, "argv", ["megabyte_jax", name])
  with pytest.raises(SystemExit) as end:
    package.main()
  assert end.value.code == 2
  assert capsys.readouterr().err == f"error: there is no command {name!r}; {hint} are {', '.join(package.COMMANDS)}\n"


HELP = """
import runpy, sys
sys.modules["jax"] = None  # an import of it fails
sys.path.insert(0, ".")
for arguments in {commands}:
  sys.argv = list(arguments) + ["--help"]
  try:
    if arguments[0].endswith(".py"):
      runpy.run_path(arguments[0], run_name="__main__")
    else:
      runpy.run_module("megabyte_jax", run_name="__main__", alter_sys=True)
  except SystemExit as end:
    assert not end.code, arguments
"""


def test_help_does_not_wait_for_jax():
  commands = [("train.py",), ("eval.py",), *(("megabyte_jax", name) for name in package.COMMANDS)]
  done = subprocess.run(
    [sys.executable, "-c", HELP.format(commands=commands)],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  usages = [line.partition(" [-h]")[0] for line in done.stdout.splitlines() if line.startswith("usage: ")]
  called = ["python train.py", "python eval.py", *(f"megabyte_jax {name}" for name in package.COMMANDS)]
  assert [usage.removeprefix("usage: ").removeprefix("python -m ") for usage in usages] == called


@pytest.mark.parametrize(
  ("program", "command", "expected"),
  [
    ("/x/train.py", "train", "python train.py"),
    ("/x/bin/megabyte_jax", "train", "megabyte_jax train"),
    ("megabyte_jax.exe", "plan", "megabyte_jax plan"),
    ("/x/megabyte_jax/__main__.py", "generate", "python -m megabyte_jax generate"),
    ("/x/megabyte_jax/commands/generate.py", "generate", "python -m megabyte_jax generate"),
  ],
)
def test_usage_names_the_command_as_it_was_called(monkeypatch, program, command, expected):
  monkeypatch.setattr(sys, "argv", [program])
  assert arguments.called(command) == expected


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (["--size=1", "--size=2"], "--size is given twice; leave one out (see python test.py --help)"),
    (["--out-file", "a", "--out_file=b"], "--out-file is given twice; leave one out (see python test.py --help)"),
    (["--fast", "--no-fast"], "--fast and --no-fast are both given; leave one out (see python test.py --help)"),
    (["--config=a", "--config=b"], "--config is given twice; leave one out (see python test.py --help)"),
    (["--config.seed=1", "--config.seed=2"], "--config.seed is given twice; leave one out"),
  ],
)
def test_a_flag_given_twice_is_one_line(capsys, given, message):
  parser = arguments.Parser("python test.py")
  parser.add_config("config", "a config")
  parser.add_argument("--size", type=int)
  parser.add_argument("--out-file")
  parser.add_argument("--fast", action=arguments.argparse.BooleanOptionalAction)
  with pytest.raises(SystemExit) as end:
    parser.parse_args(given)
  assert end.value.code == 2
  assert capsys.readouterr().err == f"error: {message}\n"


def test_a_flag_after_two_hyphens_is_none():
  parser = arguments.Parser("python test.py")
  parser.add_argument("--size", type=int)
  parser.add_argument("files", nargs="*")
  parser.add_argument("--out-file")
  names = ["--size=2", "--size=3", "--out_file"]
  assert parser.parse_args(["--size=1", "--", *names]).files == names


def test_a_flag_that_collects_values():
  parser = arguments.Parser("python test.py")
  parser.add_argument("--flags", action="append")
  assert parser.parse_args(["--flags=--a=1", "--flags=--b"]).flags == ["--a=1", "--b"]


def test_flags_are_not_abbreviated(capsys):
  """The beginning of a flag beside the flag itself would be a second value that nobody is told of."""
  parser = arguments.Parser("python test.py")
  parser.add_argument("--batch-size", type=int)
  with pytest.raises(SystemExit):
    parser.parse_args(["--batch=4", "--batch-size=8"])
  assert "unknown flag --batch" in capsys.readouterr().err


class FakeIPython:
  def get_ipython(self):
    return self


def test_in_a_notebook_mistakes_are_exceptions(monkeypatch):
  """And sys.stdout is afterwards what it was, though training replaces it."""
  parser = arguments.Parser("python test.py")
  parser.add_argument("--size", type=int)
  monkeypatch.setitem(sys.modules, "IPython", FakeIPython())
  with pytest.raises(FlagError, match="--size must be a whole number, not 'x'"):
    parser.parse_args(["--size=x"])
  before = sys.stdout, sys.unraisablehook

  def main():
    sys.stdout = object()
    raise OSError("the disk is gone")

  with pytest.raises(OSError, match="the disk is gone"):
    command_line.run(main)
  assert (sys.stdout, sys.unraisablehook) == before


@pytest.mark.parametrize(
  ("command", "given", "names"),
  [
    (train, "--workdir=~/a --init_from=~/b --config.data.train=~/c", {"workdir": "a", "init_from": "b"}),
    (
      evaluation,
      "--workdir=~/a --data=~/b --per-byte-out=~/c.npy",
      {"workdir": "a", "data": "b", "per_byte_out": "c.npy"},
    ),
    (
      generate,
      "--workdir ~/a --prompt-file=~/file --output=~/b",
      {"prompt_file": "file", "workdir": "a", "output": "b"},
    ),
    (compress, "~/a ~/b --workdir=~/c", {"file": "a", "out": "b", "workdir": "c"}),
    (plan, "--config=~/tiny.py --save=~/a", {"save": "a"}),
    (tables, "figure3 --plot=~/a.png --runs=~/b", {"plot": "a.png", "runs": "b"}),
    (prepare, "pack ~/a ~/b --tfds-dir=~/c", {"source": "a", "folder": "b", "tfds_dir": "c"}),
    (prepare, "convert tfds:x --out=~/a --tfds-dir=~/b", {"out": "a", "tfds_dir": "b"}),
    (prepare, "verify ~/a", {"folder": "a"}),
  ],
)
def test_the_home_folder_in_every_path(tmp_path, monkeypatch, command, given, names):
  """A shell leaves `~` alone after `=`."""
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "file").write_text("x")
  (tmp_path / "tiny.py").write_text((ROOT / "tests/tiny_config.py").read_text())
  args = vars(command.parse_arguments(given.split()))
  assert {name: args[name] for name in names} == {name: str(tmp_path / path) for name, path in names.items()}
  if command is train:
    assert args["config"].data.train == str(tmp_path / "c")


def test_commands_to_try_next_can_be_copied():
  """Whatever the folder is called."""
  folder = "my runs/it's"
  told = what_next(folder, "loss.png", DataConfig())
  commands = [line for line in told.splitlines() if line.startswith("  python")]
  flags = [flag for line in commands for flag in shlex.split(line) if flag.startswith("--workdir=")]
  assert flags == [f"--workdir={folder}", f"--workdir={folder}", "--workdir=runs/mine"]
  for of_ones_own in (DataConfig(train="my texts"), DataConfig(train="sample:x", form="image", image_size=8)):
    assert "runs/mine" not in what_next(folder, "", of_ones_own)
  assert '--prompt="It is a truth"' in told and "--prompt" not in what_next(folder, "", DataConfig(train="my texts"))


NOTEBOOK = """
import importlib, runpy, signal, sys
sys.path.insert(0, ".")
from megabyte_jax.commands import arguments, command_line
arguments.in_notebook = command_line.in_notebook = lambda: True  # as IPython would have it, see above
streams, hook, handler = (sys.stdout, sys.stderr), sys.unraisablehook, signal.getsignal(signal.SIGINT)
for given in (["--config.seed=x"], ["--no_such_flag=1"], ["--config=nothing.py"], ["--help"]):
  sys.argv = ["train.py", *given]
  try:
    runpy.run_path("train.py", run_name="__main__")
  except SystemExit as end:
    assert given == ["--help"] and not end.code
  except Exception as error:
    print(type(error).__name__, error)
sys.argv = ["train.py", "--config=tests/tiny_config.py", "--config.num_steps=1", "--workdir=FOLDER"]
for _ in range(2):  # the second time all is trained already
  runpy.run_path("train.py", run_name="__main__")
  assert streams == (sys.stdout, sys.stderr)
sys.argv = ["ipykernel_launcher.py", "-f", "kernel.json"]
import train
train = importlib.reload(train)
train.main(["--config=tests/tiny_config.py", "--config.num_steps=1", "--workdir=FOLDER"])
assert streams == (sys.stdout, sys.stderr)
assert sys.unraisablehook is hook and signal.getsignal(signal.SIGINT) is handler
"""


@pytest.mark.slow
def test_a_notebook_runs_and_imports_train_again_and_again(tmp_path):
  """Mistakes are ordinary exceptions there, not the end of the process."""
  done = subprocess.run(
    [sys.executable, "-c", NOTEBOOK.replace("FOLDER", str(tmp_path / "run"))],
    cwd=ROOT,
    env=environment() | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "MPLBACKEND": "agg"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  said = [line for line in done.stdout.splitlines() if line.startswith("FlagError ")]
  assert said == [
    "FlagError --config.seed must be a whole number, not 'x'",
    "FlagError unknown flag --no-such-flag (see python train.py --help)",
    "FlagError --config: No such file or directory: 'nothing.py'",
  ]
  assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
