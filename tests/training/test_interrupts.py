"""Ctrl-C at awkward moments: a command ends at once without a traceback, and other programs keep their own ways."""

import signal
import subprocess
import sys

import pytest
from run_commands import ROOT, environment

from megabyte_jax.training import stop_signal


def in_a_terminal(*arguments, **options):
  """The ended command `python ARGUMENTS`, which Ctrl-C ends as in a terminal, be it ignored here or not."""
  command = [sys.executable, *arguments]
  program = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv({command[0]!r}, {command!r})"
  options = {"cwd": ROOT, "env": environment()} | options
  return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, **options)


@pytest.fixture
def interrupted_imports(tmp_path):
  """Variables with which Ctrl-C comes while jax is imported."""
  (tmp_path / "jax.py").write_text("import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(20)\n")
  return environment() | {"PYTHONPATH": str(tmp_path)}


def test_an_interrupt_that_python_would_forget():
  """Ctrl-C within a callback of the garbage collector: Python prints it and goes on."""
  program = """
import gc, signal, time
from megabyte_jax.commands import command_line
from megabyte_jax.files.folder_lock import locked

def interrupt(phase, info):
  gc.callbacks.remove(interrupt)
  signal.raise_signal(signal.SIGINT)

def main():
  gc.callbacks.append(interrupt)
  gc.collect()
  time.sleep(20)

command_line.run(main)
"""
  result = in_a_terminal("-c", program)
  assert (result.returncode, result.stderr) == (130, "interrupted\n")


HALF_WRITTEN = """
import os, pathlib, signal, sys, time
from megabyte_jax.commands import command_line, stopping
from megabyte_jax.files.atomic_file import removed_at_the_end, replacing
from megabyte_jax.parallel import distributed
from etils import epath

number, deaf = map(int, sys.argv[1:])
if number:
  signal.signal(number, signal.SIG_DFL)
stopping._PATIENCE = 0.1

def main():
  with replacing("out") as path, removed_at_the_end(epath.Path("folder.tmp")):
    path.write_text("half")
    os.mkdir("folder.tmp")
    assert len(os.listdir()) == 2
    while True:
      try:
        if not number:
          distributed.end(0, at_once=True)  # as the signals of a run whose last step is saved
        os.kill(os.getpid(), number)
        time.sleep(20)
      except KeyboardInterrupt:
        if not deaf:
          raise
        time.sleep(20)  # as a library that compiles for minutes

command_line.run(main)
"""


@pytest.mark.parametrize(
  ("number", "deaf", "code"),
  [
    (signal.SIGINT, False, 130),
    (signal.SIGTERM, False, -signal.SIGTERM),
    (signal.SIGHUP, False, -signal.SIGHUP),
    (signal.SIGTERM, True, 128 + signal.SIGTERM),
    (0, False, 0),
  ],
)
def test_what_is_half_written_is_removed(tmp_path, number, deaf, code):
  command = [sys.executable, "-c", HALF_WRITTEN, str(int(number)), str(int(deaf))]
  here = environment() | {"PYTHONPATH": str(ROOT)}
  result = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
  assert (result.returncode, result.stderr) == (code, "interrupted\n" if code == 130 else "")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "command", [("train.py",), ("eval.py",), ("-m", "megabyte_jax", "tables"), ("-m", "megabyte_jax.tables")]
)
def test_an_interrupt_while_libraries_are_imported(command, interrupted_imports):
  result = in_a_terminal(*command, env=interrupted_imports)
  assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_is_left_alone_in_modules_of_others(tmp_path):
  """Importing the package changes no signal, also where another program is run as a module."""
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs/__init__.py").write_text("import megabyte_jax\n")
  check = "import signal\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
  (tmp_path / "theirs/program.py").write_text(check)
  result = in_a_terminal("-m", "theirs.program", cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)})
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
  ("evaluates", "rest"),
  [
    (
      True,
      "repeats the final evaluation, and `python -m megabyte_jax eval --workdir='my run' --max-bytes=1000000` scores "
      "a part",
    ),
    (False, "repeats the final samples"),
  ],
)
def test_an_interrupt_after_the_last_step_says_what_there_is_to_do(monkeypatch, evaluates, rest):
  told = []
  monkeypatch.setattr(stop_signal, "_say", told.append)
  monkeypatch.setattr(stop_signal.distributed, "end", lambda code, at_once: told.append(code))
  # A watcher that a command in this process has left may look after the handlers are back, and would end the process.
  watched = signal.set_wakeup_fd(-1)
  with stop_signal.StopSignal() as stop:
    stop.all_is_saved("my run", evaluates)
    assert not told
    signal.raise_signal(signal.SIGTERM)
  signal.set_wakeup_fd(watched)
  assert told[:2] == [f"\nall steps are saved in my run; the same command {rest}\n", 0]
