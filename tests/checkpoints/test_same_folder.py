"""A work directory that is moved, deleted or replaced while a run goes on is noticed before anything is saved."""

import dataclasses
import os
import shutil

import pytest
from tiny_config import get_config

from megabyte_jax.checkpoints.same_folder import SameFolder
from megabyte_jax.checkpoints.saved_config import load_config, save_config
from megabyte_jax.config import Config
from megabyte_jax.errors import CheckpointError

CONFIG = Config.from_dict(get_config())


@pytest.fixture
def workdir(tmp_path):
  save_config(tmp_path / "run", CONFIG)
  return str(tmp_path / "run")


def test_the_same_folder_is_left_alone(workdir, capsys):
  with SameFolder(workdir, CONFIG) as folder:
    os.remove(f"{workdir}/config.json")
    folder.check()
  assert os.listdir(workdir) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda path: os.rename(path, f"{path}2")])
def test_a_missing_folder_is_made_anew(workdir, capsys, gone):
  with SameFolder(workdir, CONFIG) as folder:
    gone(workdir)
    folder.check()
  assert load_config(workdir) == CONFIG
  assert capsys.readouterr().err.startswith(f"warning: {workdir} was moved or deleted while training; it is made anew")


def test_nothing_is_written_into_the_folder_of_another_run(workdir, tmp_path):
  with SameFolder(workdir, CONFIG) as folder:
    os.rename(workdir, tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", workdir)
    folder.check()  # a copy continues the run as well
    save_config(workdir, dataclasses.replace(CONFIG, seed=5))
    with pytest.raises(
      CheckpointError, match=r"is no longer the folder that this run began in, .*; put that folder back"
    ):
      folder.check()
