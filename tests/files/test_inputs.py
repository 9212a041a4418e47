"""Inputs that have no end, and outputs that would destroy an input, are refused."""

import pytest

from megabyte_jax.commands import compress, eval, export, generate
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.files import inputs, outputs


@pytest.fixture
def text(tmp_path):
  path = tmp_path / "text.txt"
  path.write_bytes(b"text")
  (tmp_path / "link").symlink_to(path)
  return path


@pytest.mark.parametrize("name", ["text.txt", "link"])
def test_no_output_replaces_what_is_read(tmp_path, text, name):
  out = tmp_path / name
  for parse, arguments in (
    (compress, [str(text), str(out)]),
    (generate, [f"--prompt-file={text}", f"--output={out}"]),
    (eval, [f"--data={text}", f"--per-byte-out={out}"]),
  ):
    with pytest.raises(ConfigError, match=r"is the file that is read, .*; it would be lost: choose another"):
      parse.parse_arguments(arguments)
    arguments[-1] = arguments[-1].replace(str(out), f"{tmp_path}/other")
    parse.parse_arguments(arguments)
  assert text.read_bytes() == b"text"


def test_devices_are_not_read(tmp_path):
  for parse, arguments in (
    (compress, ["/dev/zero", f"{tmp_path}/out"]),
    (generate, ["--prompt-file=/dev/zero"]),
  ):
    with pytest.raises(DataError, match="/dev/zero is a terminal or a device; name a file"):
      parse.parse_arguments(arguments)
  inputs.check_readable(str(tmp_path), DataError)
  inputs.check_readable(str(tmp_path / "nothing"), DataError)


def test_where_an_export_cannot_go_is_said_before_any_work(tmp_path, text):
  (tmp_path / "full").symlink_to(tmp_path)
  for folder, message in {
    "": "FOLDER is empty",
    "pretrained:x": r"would be read as a name of the kind pretrained:NAME; write \./pretrained:x",
    str(tmp_path): "is not empty; name a new folder",
    str(tmp_path / "full"): "is not empty; name a new folder",
    str(text): "is a file, not a folder",
    "gs://x/y": "gs://x/y is not on this machine's disks; write to a disk, then copy it there",
    "http://x/y": "is not on this machine's disks",
  }.items():
    with pytest.raises(ConfigError, match=message):
      export.parse_arguments([folder])
  (tmp_path / "nowhere").symlink_to(tmp_path / "new")
  for folder in ("nowhere", "new"):
    export.parse_arguments([str(tmp_path / folder)])


def test_a_current_folder_that_is_gone_is_said(tmp_path, monkeypatch):
  gone = tmp_path / "gone"
  gone.mkdir()
  monkeypatch.chdir(gone)
  gone.rmdir()
  with pytest.raises(ConfigError, match="the current folder was removed"):
    outputs.check_output_folder("--workdir", "runs/x")
