"""Folders in which links, pipes, packed data or the run itself lie, and names that lead out of where they belong."""

import dataclasses
import logging
import os
import threading
import time

import numpy as np
import pytest
from tiny_config import get_config

import train
from megabyte_jax.config import Config, DataConfig
from megabyte_jax.data.folders import find_files, inside_source
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.packing.pack import pack
from megabyte_jax.data.pipes import open_pipe
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.files import inputs

DATA = DataConfig(train="", validation="")


def test_links_that_lead_to_a_folder_in_millions_of_ways(tmp_path):
  for i in range(22):
    (tmp_path / f"d{i}").mkdir()
    for name in ("left", "right") if i < 21 else ():
      (tmp_path / f"d{i}" / name).symlink_to(tmp_path / f"d{i + 1}")
  for spec in (tmp_path, tmp_path / "**"):
    with pytest.raises(DataError, match=r"links lead to folder .* in more than 100 ways; remove them"):
      find_files(str(spec))


def test_folders_nested_without_end(tmp_path):
  folder = tmp_path
  for _ in range(210):
    folder /= "a"
  folder.mkdir(parents=True)
  with pytest.raises(DataError, match="is nested more than 200 folders deep"):
    find_files(str(tmp_path))


def test_what_is_no_file_is_left_out_and_counted(tmp_path, caplog):
  (tmp_path / "a.txt").write_bytes(b"text")
  os.mkfifo(tmp_path / "pipe")
  with caplog.at_level(logging.WARNING):
    assert find_files(str(tmp_path))[1] == ["a.txt"]
  assert "1 entries are left out, as they are not files but pipes, sockets or devices" in caplog.text


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"text")
  with pytest.raises(DataError, match=r"a\.txt/ is a file; leave out the / behind it"):
    open_path(f"{tmp_path}/a.txt/", DATA)


@pytest.mark.parametrize("name", ["sample:", "sample:..", "sample:../../..", "sample:text/../../__init__.py"])
def test_sample_data_lie_in_their_folder(name):
  with pytest.raises(ConfigError, match=r"no sample data .* there are sample:audio/train"):
    open_path(name, DATA)


def test_packed_data_are_no_documents_of_the_folder_around_them(tmp_path):
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "a.txt").write_bytes(b"text")
  pack(str(tmp_path / "texts"), str(tmp_path / "packed"), DATA)
  with pytest.raises(DataError, match=r"has the packed folder .*packed in it, whose files are not documents"):
    open_path(str(tmp_path), DATA)


def test_a_manifest_of_another_program_makes_no_packed_folder(tmp_path):
  (tmp_path / "manifest.json").write_text('{"name": "an extension"}')
  (tmp_path / "a.js").write_text("1")
  assert list(open_path(str(tmp_path), DATA).names) == ["a.js", "manifest.json"]


def test_places_that_would_become_data(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"text")
  run = str(tmp_path / "runs" / "mine")
  for spec in (f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}/**", f"{tmp_path}/**/*", f"{tmp_path}/a.txt,{tmp_path}"):
    assert inside_source(run, spec), spec
  assert inside_source(str(tmp_path), str(tmp_path))
  for spec in ("", f"{tmp_path}/a.txt", f"{tmp_path}/*", f"{tmp_path}/**/*.py", f"{tmp_path}/nothing", "sample:text"):
    assert not inside_source(run, spec), spec
  assert not inside_source(str(tmp_path / ".runs" / "mine"), str(tmp_path))  # hidden, so it is left out
  assert not inside_source(f"{tmp_path}s", str(tmp_path))


def test_no_run_lies_in_its_own_data(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"text" * 99)
  config = Config.from_dict(get_config())
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(tmp_path)))
  with pytest.raises(ConfigError, match=r"--workdir=.* lies within the data .*, and would change them"):
    train.train(config, f"{tmp_path}/runs/mine")
  assert os.listdir(tmp_path) == ["a.txt"]


def test_a_pipe_that_nobody_writes_into_is_said(tmp_path, caplog, monkeypatch):
  path = str(tmp_path / "pipe")
  os.mkfifo(path)
  monkeypatch.setattr(inputs.waiting_is_said.__wrapped__, "__defaults__", (0.05,))

  def write():
    while "waiting for somebody to write into it" not in caplog.text:
      time.sleep(0.01)
    with open(path, "wb") as file:
      file.write(b"text")

  writer = threading.Thread(target=write)
  with caplog.at_level(logging.WARNING):
    writer.start()
    source = open_pipe(path)
    writer.join()
  np.testing.assert_array_equal(source.read(0, 0, 4), np.frombuffer(b"text", np.uint8))
