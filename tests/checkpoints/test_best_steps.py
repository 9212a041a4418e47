import argparse
import json

import jax
import jax.numpy as jnp
import pytest

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.commands.arguments import step_argument
from megabyte_jax.config import CheckpointConfig
from megabyte_jax.errors import CheckpointError

BPB = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0, 5: 2.7, 6: float("nan"), 7: 2.9}


def save(checkpoints, step, bpb=None):
  checkpoints.save(step, {"x": jnp.full(3, float(step))}, {"count": jnp.int32(step)}, {})
  if bpb is not None:
    checkpoints.record(step, bpb)


def steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize(("keep_best", "kept"), [(0, [6, 7]), (1, [4, 6, 7]), (2, [2, 4, 6, 7]), (3, [2, 3, 4, 6, 7])])
def test_the_best_stay_beside_the_last(tmp_path, keep_best, kept):
  with Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_best=keep_best)) as checkpoints:
    for step, bpb in BPB.items():
      save(checkpoints, step, bpb)
  assert steps(tmp_path) == kept


def test_a_resumed_run_remembers_its_best(tmp_path):
  config = CheckpointConfig(keep=1, keep_best=1)
  with Checkpoints(tmp_path, config) as checkpoints:
    save(checkpoints, 1, 2.0)
  with Checkpoints(tmp_path, config) as checkpoints:
    for step in (2, 3):
      save(checkpoints, step, 2.5)
    assert checkpoints.best_step() == 1
  assert steps(tmp_path) == [1, 3]
  with Checkpoints(tmp_path, config) as checkpoints:
    save(checkpoints, 4, 1.5)
    save(checkpoints, 5)
  assert steps(tmp_path) == [4, 5]


def test_the_best_is_found_by_a_reader(tmp_path):
  with Checkpoints(tmp_path, CheckpointConfig(keep=9)) as checkpoints:
    save(checkpoints, 1)
    with Checkpoints(tmp_path, read_only=True) as reader:
      with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* was evaluated"):
        reader.best_step()
      save(checkpoints, 2, 2.0)
      save(checkpoints, 3, 2.1)
      checkpoints.record(99, 1.0)  # it was never saved
      checkpoints.wait()
      assert reader.best_step() == 2
      wanted = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
      assert reader.restore_params(wanted, reader.best_step()).params["x"].tolist() == [2, 2, 2]
  assert json.loads((tmp_path / "checkpoints/validation_bpb.json").read_text()) == {"2": 2.0, "3": 2.1}


@pytest.mark.parametrize("text", ['{"1": ', "[1]", '{"one": 2.0}', '{"1": null}', "[" * 100_000])
def test_a_broken_list_is_written_anew(tmp_path, text):
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "checkpoints/validation_bpb.json").write_text(text)
  with Checkpoints(tmp_path) as checkpoints:
    save(checkpoints, 1, 2.0)
    assert checkpoints.best_step() == 1


def test_step_on_the_command_line():
  assert step_argument("12") == 12
  assert step_argument("best") == "best"
  with pytest.raises(argparse.ArgumentTypeError, match="'last' is neither a number nor best"):
    step_argument("last")
