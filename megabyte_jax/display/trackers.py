"""Sends a run's numbers and pictures to Weights & Biases or MLflow, where config.tracker asks for it.

The run there is resumed with the run here: its name is kept in `workdir`/tracker.json. Accounts, servers and offline
use are set up as either package has it (WANDB_MODE=offline, MLFLOW_TRACKING_URI, ...).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from etils import epath

from megabyte_jax.config import Config
from megabyte_jax.errors import CheckpointError, ConfigError
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.json_files import read_json

TRACKER_FILE = "tracker.json"


class _Sink(Protocol):
  """One package. Any of its errors may be raised by any method."""

  run_id: str

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Records values of a step."""
    ...

  def picture(self, name: str, path: str) -> None:
    """Records a picture that lies at `path`."""
    ...

  def finish(self, failed: bool) -> None:
    """Ends the run there."""
    ...


def check_tracker(name: str) -> None:
  """Raises ConfigError where the package of config.tracker is not installed; a run can say so before it begins."""
  if name:
    _import(name)


class Tracker:
  """Passes numbers and pictures on; a context manager, and nothing at all where config.tracker is empty.

  Training goes on without it where the package fails, which is warned of once. Only process 0 sends anything.

  Args:
    config: of the run; `tracker` and `tracker_project` say where it goes.
    workdir: the run's folder, which holds the name of the run there.

  Raises:
    ConfigError: the package is not installed, or the run cannot be opened there.
    CheckpointError: tracker.json is damaged.
  """

  def __init__(self, config: Config, workdir: str):
    self._sink: _Sink | None = None
    if not config.tracker or jax.process_index() > 0:
      return
    path = epath.Path(workdir) / TRACKER_FILE
    known = read_json(path, CheckpointError, "remove it to begin a new run there") if path.exists() else {}
    run_id = str(known.get(config.tracker, ""))
    module = _import(config.tracker)
    opened: _Sink
    try:
      if config.tracker == "wandb":
        opened = _Wandb(module, config, workdir, run_id)
      else:
        opened = _Mlflow(module, config, workdir, run_id)
    except Exception as error:  # of a server, an account, a network
      raise ConfigError(
        f"config.tracker={config.tracker}: no run can be opened ({_said(error)}); set up {config.tracker}, or leave "
        "config.tracker empty"
      ) from error
    with replacing(path) as temporary:
      temporary.write_text(json.dumps({**known, config.tracker: opened.run_id}) + "\n")
    self._sink = opened

  def __enter__(self) -> Tracker:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._try("finish", kind is not None)
    self._sink = None

  def log(self, step: int, values: Mapping[str, Any]) -> None:
    """Passes on the values of a step that are finite numbers."""
    self._try("log", step, {name: value for name, value in values.items() if name != "step" and value is not None})

  def picture(self, path: str) -> None:
    """Passes on a picture under the name of its file."""
    self._try("picture", os.path.splitext(os.path.basename(path))[0], path)

  def _try(self, method: str, *arguments: Any) -> None:
    if self._sink is None:
      return
    try:
      getattr(self._sink, method)(*arguments)
    except Exception as error:  # see _Sink
      logging.warning("the tracker has failed, and the run goes on without it: %s", _said(error))
      self._sink = None


class _Wandb:
  def __init__(self, module: Any, config: Config, workdir: str, run_id: str):
    self._wandb, self.run_id = module, run_id or uuid.uuid4().hex[:16]
    self._run = module.init(
      project=config.tracker_project,
      id=self.run_id,
      name=_name_of(workdir),
      resume="allow",
      config=config.to_dict(),
      dir=workdir,
    )
    self._run.define_metric("*", step_metric="step")  # W&B's own steps may not go back, as a resumed run does

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({**values, "step": step})

  def picture(self, name: str, path: str) -> None:
    self._run.log({name: self._wandb.Image(path)})

  def finish(self, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


class _Mlflow:
  def __init__(self, module: Any, config: Config, workdir: str, run_id: str):
    self._mlflow = module
    module.set_experiment(config.tracker_project)
    run = module.start_run(run_id=run_id) if run_id else module.start_run(run_name=_name_of(workdir))
    self.run_id = run.info.run_id
    if not run_id:
      module.log_dict(config.to_dict(), "config.json")

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._mlflow.log_metrics(dict(values), step=step)

  def picture(self, name: str, path: str) -> None:
    self._mlflow.log_artifact(path)

  def finish(self, failed: bool) -> None:
    self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _name_of(workdir: str) -> str:
  return os.path.basename(workdir.rstrip("/"))


def _import(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ConfigError(
      f'config.tracker={name} needs {name}, which is not installed: pip install -e ".[{name}]"'
    ) from error


def _said(error: Exception) -> str:
  return " ".join(f"{type(error).__name__}: {error}".split())[:300]
