"""What commands print: nothing that drives a terminal, and no traceback where nobody reads it."""

import errno
import functools
import importlib
import io
import logging
import os
import sys
import threading
import time

import pytest

from megabyte_jax import __main__ as main_module
from megabyte_jax.commands import arguments, command_line
from megabyte_jax.config import overrides
from megabyte_jax.errors import ConfigError, DataError, FlagError
from megabyte_jax.files import inputs


def test_names_of_files_do_not_drive_the_terminal(monkeypatch, capsys):
  monkeypatch.setattr(command_line.distributed, "end", sys.exit)

  def fails(error):
    raise error

  said = r"\x1b[2J\x9b31mred\ris empty\nremove it" + "\t\u00e9"
  raw = "\x1b[2J\x9b31mred\ris empty\nremove it\t\u00e9"
  refused = OSError(errno.ENOSPC, "No space left on device", raw)
  refused.add_note(raw)
  for error, shown in (
    (DataError(raw), f"error: {said}\n"),
    (ConfigError("pack it:", raw), f"error: pack it:\n{said}\n"),
    (FloatingPointError(raw), f"error: {said}\n"),
    (refused, f"error: {said}: No space left on device; make room there, or name another place\n{said}\n"),
  ):
    with pytest.raises(SystemExit):
      command_line._errors_in_one_line(functools.partial(fails, error))
    assert capsys.readouterr().err == shown


def test_names_in_flags_and_warnings_are_one_line(monkeypatch, capsys, tmp_path):
  with pytest.raises(SystemExit):
    arguments.Parser("train").parse_args(["--a\nb=c"])
  assert capsys.readouterr().err == r"error: unknown flag --a\nb (see train --help)" + "\n"
  monkeypatch.setattr(logging.root, "handlers", [command_line._Warnings()])
  logging.warning("%s is a pipe", "a\nb")
  logging.getLogger("another").warning("goes its own way")
  said = capsys.readouterr().err
  assert said == r"warning: a\nb is a pipe" + "\n" + "WARNING:another:goes its own way\n"


def test_help_for_a_reader_that_is_gone(monkeypatch):
  reading, writing = os.pipe()
  os.close(reading)
  with io.TextIOWrapper(os.fdopen(writing, "wb")) as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["megabyte_jax", "--help"])
    with pytest.raises(SystemExit) as ended:
      main_module.main()
    assert ended.value.code == 0


def test_help_without_docstrings_as_under_python_OO(monkeypatch):
  module = importlib.import_module("megabyte_jax.commands.eval")
  first = module.__doc__.partition("\n")[0]
  assert f"  eval      {first}\n" in main_module.describe()
  monkeypatch.setattr(module, "__doc__", None)
  assert "  eval      \n" in main_module.describe()


def test_a_config_from_a_pipe_that_nobody_writes_into_is_said(tmp_path, caplog, monkeypatch):
  path = tmp_path / "pipe"
  os.mkfifo(path)
  monkeypatch.setattr(inputs.waiting_is_said.__wrapped__, "__defaults__", (0.05,))

  def write():
    while "waiting for somebody to write into it" not in caplog.text:
      time.sleep(0.01)
    path.write_text("def get_config():\n  return {'a': 3}\n")

  writer = threading.Thread(target=write, daemon=True)
  parser = arguments.Parser("train")
  parser.add_config("config", "a file")
  with caplog.at_level(logging.WARNING):
    writer.start()
    found = parser.parse_args([f"--config={path}"])
    writer.join()
  assert found.config.a == 3
  assert sys.modules["config_config"].__file__ == f"<{path}>"  # what reads the sources of modules would wait for ever


def test_an_error_in_a_config_from_a_pipe_has_its_line(tmp_path, capsys):
  path = tmp_path / "pipe"
  os.mkfifo(path)
  writer = threading.Thread(target=path.write_text, args=("a = 1\nraise ValueError('b')\n",), daemon=True)
  writer.start()
  parser = arguments.Parser("train")
  parser.add_config("config", "a file")
  with pytest.raises(SystemExit):
    parser.parse_args([f"--config={path}"])
  assert f"b (<{path}>, line 2)" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["/dev/zero", "config.json"])
def test_config_files_are_python(tmp_path, config):
  (tmp_path / "config.json").write_text('{"a": true}')
  with pytest.raises(FlagError, match=r"is a device; name a config file|is not Python"):
    overrides.load("--config", os.path.join(tmp_path, config))
