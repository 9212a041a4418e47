"""Damage to a run's files: never wrong parameters, never a traceback, and what is intact is still read."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny_config
from run_commands import MESH

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.init_from import parameters_from
from megabyte_jax.checkpoints.saved_config import all_differences, check_saved_config, load_config, save_config
from megabyte_jax.checkpoints.trained_model import read_parameters
from megabyte_jax.config import CheckpointConfig, Config
from megabyte_jax.errors import CheckpointError
from megabyte_jax.training.resume import restored_state
from megabyte_jax.training.state import abstract_state, initial_state

TINY = Config.from_dict(tiny_config.get_config())
CONFIG = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, levels=TINY.model.levels[:1]))
NOT_OF_THE_MODEL = ("model.attention", "model.remat", "model.scan_layers")


def states():
  """{step: its state}: two that differ in each array."""
  one = initial_state(CONFIG, MESH)
  other = jax.tree.map(lambda leaf: leaf + 1, one)
  return {1: one, 2: other}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with checkpoints of steps 1 and 2."""
  workdir = tmp_path_factory.mktemp("damage") / "run"
  save_config(workdir, CONFIG)
  with Checkpoints(workdir, CheckpointConfig(keep=9)) as checkpoints:
    for step, state in states().items():
      checkpoints.save(step, state.parameters, state.opt_state, {"config": CONFIG.to_dict()})
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def delete(path):
  path.unlink()


def empty(path):
  path.write_bytes(b"")


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
  path.write_bytes(bytes(path.stat().st_size))


def files_of(workdir, step):
  folder = workdir / "checkpoints" / str(step)
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_is(tree, expected):
  for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(leaf, other)


DAMAGES = (delete, empty, cut, zero)


@pytest.mark.parametrize(
  ("turn", "every"), [(0, 3), *(pytest.param(turn, 1, marks=pytest.mark.slow) for turn in range(4))]
)
def test_any_damaged_file_of_the_newest_checkpoint(saved, tmp_path, turn, every):
  """Each file in one of four ways a turn; the quick test takes a third of them."""
  expected, abstract = states(), abstract_state(CONFIG, MESH).parameters
  names = files_of(saved, 2)
  assert {name.split("/")[0] for name in names} >= {"params", "opt_state", "meta", "files.json"}
  names = names[::every]
  steps = {}
  for number, name in enumerate(names):
    workdir = shutil.copytree(saved, tmp_path / str(number))
    DAMAGES[(number + turn) % 4](workdir / "checkpoints/2" / name)
    parameters, step = read_parameters(workdir, CONFIG, abstract)
    assert_is(parameters, expected[step].parameters)
    with Checkpoints(workdir) as checkpoints:
      state = restored_state(CONFIG, MESH, checkpoints)
    assert_is(state[1:], expected[int(state.step)][1:])
    steps[name] = step, int(state.step)
    shutil.rmtree(workdir)
  harmless = {name for name, found in steps.items() if found == (2, 2)}
  assert harmless <= {"_CHECKPOINT_METADATA", "commit_success.txt"}
  without_optimizer = {name for name, found in steps.items() if found == (2, 1)}
  assert without_optimizer == {name for name in names if name.startswith("opt_state/")}


def test_a_lost_optimizer_state_keeps_no_parameters_from_being_read(workdir):
  shutil.rmtree(workdir / "checkpoints/2/opt_state")
  abstract = abstract_state(CONFIG, MESH).parameters
  for asked in (None, 2):
    parameters, step = read_parameters(workdir, CONFIG, abstract, asked)
    assert step == 2
    assert_is(parameters, states()[2].parameters)
  fresh = initial_state(CONFIG, MESH).parameters
  assert_is(parameters_from(str(workdir), fresh, CONFIG, MESH), states()[2].parameters)


@pytest.mark.parametrize(
  ("turn", "every"), [(0, 7), *(pytest.param(turn, 1, marks=pytest.mark.slow) for turn in range(3))]
)
def test_any_changed_byte_of_the_config_changes_no_model(saved, tmp_path, turn, every):
  """It is one line, or what changed has no part in predictions."""
  good = (saved / "config.json").read_bytes()
  with Checkpoints(saved, read_only=True) as checkpoints:
    meta = checkpoints.meta()
  believed = 0
  for place in range(0, len(good), every):
    data = bytearray(good)
    data[place] = (data[place] ^ 1, ord("9"), data[place] ^ 128)[(place + turn) % 3]
    (tmp_path / "config.json").write_bytes(data)
    try:
      config = load_config(tmp_path)
      check_saved_config(tmp_path, config, meta)
    except CheckpointError as error:
      assert str(tmp_path / "config.json") in str(error) and "\n" not in str(error)
      continue
    believed += bytes(data) != good
    differ = {key for key in all_differences(CONFIG.to_dict(), config.to_dict()) if key.startswith("model.")}
    assert differ <= set(NOT_OF_THE_MODEL), differ
  assert believed < len(good) / every / 2


@pytest.mark.parametrize(
  ("level", "model", "names"),
  [
    ({"rotary": True}, {}, r"model\.levels\[0\]\.rotary: false -> true"),
    ({}, {"activation": "gelu"}, r'model\.activation: "relu" -> "gelu"'),
    ({}, {"dropout": 0.0, "qk_norm": True}, r"model\.dropout: 0\.1 -> 0\.0, model\.qk_norm: false -> true"),
  ],
)
def test_a_changed_field_of_the_model_is_named(workdir, level, model, names):
  levels = (dataclasses.replace(CONFIG.model.levels[0], **level),)
  other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, levels=levels, **model))
  save_config(workdir, other)
  message = rf"config\.json differs from the config that the checkpoint of step 2 was trained with .*: {names}; restore"
  with pytest.raises(CheckpointError, match=message):
    read_parameters(str(workdir), load_config(workdir), abstract_state(CONFIG, MESH).parameters)


def test_settings_that_give_the_same_numbers_may_change(workdir):
  model = dataclasses.replace(CONFIG.model, remat="full", attention="xla")
  save_config(workdir, dataclasses.replace(CONFIG, model=model, batch_size=2, log_every=7))
  _, step = read_parameters(str(workdir), load_config(workdir), abstract_state(CONFIG, MESH).parameters)
  assert step == 2
