"""Numbers and pictures sent to Weights & Biases and MLflow, which are stand-ins here: nothing leaves this machine."""

import dataclasses
import json
import sys

import pytest
import tiny_config
from fake_trackers import FakeMlflow, FakeWandb

import train
from megabyte_jax.config import Config
from megabyte_jax.display.metrics import Metrics
from megabyte_jax.display.trackers import Tracker
from megabyte_jax.errors import CheckpointError, ConfigError

CONFIG = Config.from_dict(tiny_config.get_config())


def tracked(name):
  return dataclasses.replace(CONFIG, tracker=name, tracker_project="books")


@pytest.fixture
def wandb(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
  return sys.modules["wandb"]


@pytest.fixture
def mlflow(monkeypatch):
  monkeypatch.setitem(sys.modules, "mlflow", FakeMlflow())
  return sys.modules["mlflow"]


def run(config, workdir, picture=None):
  with Tracker(config, str(workdir)) as tracker:
    options = {"num_steps": 9, "bytes_per_step": 10, "tensorboard": False}
    with Metrics(workdir, tracker=tracker, **options) as metrics:
      metrics.log(3, loss=1.0, learning_rate=0.1, grad_norm=float("nan"))
      metrics.write(3, {"validation_bpb": 2.5})
    if picture:
      tracker.picture(str(picture))


def test_weights_and_biases_get_the_same_numbers_and_resume_the_same_run(wandb, tmp_path):
  run(tracked("wandb"), tmp_path / "run", tmp_path / "run" / "loss.png")
  (init, _), *_ = [call[::-1] for call in wandb.calls if call[0] == "init"]
  assert init["project"] == "books" and init["name"] == "run" and init["resume"] == "allow"
  assert init["config"] == tracked("wandb").to_dict()
  assert ("define_metric", ("*",), {"step_metric": "step"}) in wandb.calls
  logged = [values for name, values in (call[:2] for call in wandb.calls) if name == "log"]
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert logged[:2] == [{name: value for name, value in line.items() if value is not None} for line in lines]
  assert logged[0]["step"] == 3 and "grad_norm" not in logged[0] and logged[1]["validation_bpb"] == 2.5
  assert logged[2] == {"loss": ("image", str(tmp_path / "run" / "loss.png"))} and wandb.calls[-1] == ("finish", 0)
  wandb.calls.clear()
  run(tracked("wandb"), tmp_path / "run")
  assert wandb.calls[0][1]["id"] == init["id"]
  wandb.calls.clear()
  run(tracked("wandb"), tmp_path / "other")
  assert wandb.calls[0][1]["id"] != init["id"]


def test_mlflow_gets_the_same_numbers_and_resumes_the_same_run(mlflow, tmp_path):
  run(tracked("mlflow"), tmp_path / "run", tmp_path / "run" / "loss.png")
  names = [name for name, _, _ in mlflow.calls]
  assert names == ["set_experiment", "start_run", "log_dict", "log_metrics", "log_metrics", "log_artifact", "end_run"]
  assert mlflow.calls[0][1] == ("books",) and mlflow.calls[1][2] == {"run_name": "run"}
  assert mlflow.calls[4][1:] == (({"validation_bpb": 2.5},), {"step": 3})
  assert mlflow.calls[5][1] == (str(tmp_path / "run" / "loss.png"),) and mlflow.calls[6][1] == ("FINISHED",)
  mlflow.calls.clear()
  run(tracked("mlflow"), tmp_path / "run")
  assert mlflow.calls[1] == ("start_run", (), {"run_id": "made"}) and "log_dict" not in [
    call[0] for call in mlflow.calls
  ]
  with pytest.raises(RuntimeError), Tracker(tracked("mlflow"), str(tmp_path / "run")):
    raise RuntimeError
  assert mlflow.calls[-1][1] == ("FAILED",)


def test_it_is_off_by_default(wandb, mlflow, tmp_path):
  run(CONFIG, tmp_path / "run")
  assert not wandb.calls and not mlflow.calls and not (tmp_path / "run" / "tracker.json").exists()


def test_a_tracker_that_fails_does_not_end_the_run(wandb, tmp_path, caplog, monkeypatch):
  init = wandb.init

  def fail(values):
    raise OSError("no network")

  def failing(**options):
    made = init(**options)
    made.log = fail
    return made

  monkeypatch.setattr(wandb, "init", failing)
  run(tracked("wandb"), tmp_path / "run")
  assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
  assert [record.getMessage() for record in caplog.records] == [
    "the tracker has failed, and the run goes on without it: OSError: no network"
  ]


def test_what_cannot_be_opened_is_one_line(wandb, tmp_path, monkeypatch):
  def refuse(**options):
    raise RuntimeError("no\naccount")

  monkeypatch.setattr(wandb, "init", refuse)
  with pytest.raises(ConfigError, match=r"tracker=wandb: no run can be opened \(RuntimeError: no account\)"):
    Tracker(tracked("wandb"), str(tmp_path))
  (tmp_path / "tracker.json").write_text("[]")
  with pytest.raises(CheckpointError, match=r"tracker\.json is not a JSON object .*; remove it"):
    Tracker(tracked("wandb"), str(tmp_path))
  monkeypatch.setitem(sys.modules, "mlflow", None)
  with pytest.raises(ConfigError, match=r"needs mlflow, which is not installed: pip install -e \"\.\[mlflow\]\"$"):
    train.train(tracked("mlflow"), str(tmp_path / "x"))
  assert not (tmp_path / "x").exists()  # said before anything is written
