"""What commands print: nothing that drives a terminal, and no traceback where nobody reads it."""

import io
import os
import sys

import pytest

from megabyte_jax import __main__ as main_module
from megabyte_jax.commands import command_line
from megabyte_jax.config import overrides
from megabyte_jax.errors import DataError, FlagError


def test_names_of_files_do_not_drive_the_terminal(monkeypatch, capsys):
  monkeypatch.setattr(command_line.distributed, "end", sys.exit)

  def fails():
    raise DataError("\x1b[2J\x9b31mred\ris empty\nremove it\t\u00e9")

  with pytest.raises(SystemExit):
    command_line._errors_in_one_line(fails)
  assert capsys.readouterr().err == "error: \\x1b[2J\\x9b31mred\\x0dis empty\nremove it\t\u00e9\n"


def test_help_for_a_reader_that_is_gone(monkeypatch):
  reading, writing = os.pipe()
  os.close(reading)
  with io.TextIOWrapper(os.fdopen(writing, "wb")) as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["megabyte_jax", "--help"])
    with pytest.raises(SystemExit) as ended:
      main_module.main()
    assert ended.value.code == 0


@pytest.mark.parametrize("config", ["/dev/zero", "config.json"])
def test_config_files_are_python(tmp_path, config):
  (tmp_path / "config.json").write_text('{"a": true}')
  with pytest.raises(FlagError, match=r"is a device; name a config file|is not Python"):
    overrides.load("--config", os.path.join(tmp_path, config))
