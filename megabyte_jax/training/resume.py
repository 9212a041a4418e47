"""Resumes a run from its newest checkpoint, or starts it, also from the parameters of another run."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.init_from import parameters_from
from megabyte_jax.checkpoints.saved_config import begins_to_skip, check_same_run, is_shipped
from megabyte_jax.config import Config
from megabyte_jax.data.sources import Source
from megabyte_jax.errors import ConfigError
from megabyte_jax.files.object_stores import is_remote
from megabyte_jax.training.schedule import same_rates
from megabyte_jax.training.state import TrainState, abstract_state, initial_state


class Start(NamedTuple):
  """The point from which training goes on.

  Attributes:
    step: optimizer steps done; 0 for a new run.
    state: to train from.
    seconds: that the run has taken so far.
    since_logged: nats, bytes and tokens since the last progress line.
    identity: what each checkpoint says of the run: `config`, `init_from`, `fingerprint`, `validation_fingerprint`,
      `skipped`.
  """

  step: int
  state: TrainState
  seconds: float
  since_logged: tuple[float, float, float]
  identity: dict[str, Any]


def resume_or_start(
  config: Config, mesh: Mesh, checkpoints: Checkpoints, source: Source, validation: Source | None, init_from: str = ""
) -> Start:
  """Restores the newest whole checkpoint; where there is none, draws the state or takes it from `init_from`.

  Args:
    source, validation: the data, which must be those that the run began with.
    init_from: the folder of a run whose parameters a new run starts from; '' draws them.

  Raises:
    ConfigError: the run did not start from `init_from`, or the mesh does not suit the model or the batch.
    CheckpointError: the run had other settings or data, or is damaged; or `init_from` holds nothing to start from.
  """
  identity: dict[str, Any] = {"config": config.to_dict(), "init_from": init_from, "fingerprint": source.fingerprint}
  identity["validation_fingerprint"] = validation.fingerprint if validation else ""
  identity["skipped"] = [source.skipped, validation.skipped if validation else 0]
  step = checkpoints.latest_step()
  if step is None:
    state = initial_state(config, mesh)
    if init_from:
      state = state._replace(parameters=parameters_from(init_from, state.parameters, config, mesh))
    return Start(0, state, 0.0, (0.0, 0.0, 0.0), identity)
  meta = checkpoints.meta(step)
  if init_from and not _same_folder(init_from, meta["init_from"]):
    began = f" but from {meta['init_from']}" if meta["init_from"] else ""
    raise ConfigError(
      f"{checkpoints.workdir} holds a run already, which did not start from {init_from}{began}; "
      "take another --workdir, or drop the flag"
    )
  free = ("num_steps",) if _may_change_length(meta["config"], config, step) else ()
  check_same_run(
    meta,
    identity["config"],
    identity["fingerprint"],
    identity["validation_fingerprint"],
    skipped=identity["skipped"],
    free=free,
    workdir=checkpoints.workdir,
  )
  if begins_to_skip(meta, identity["config"]) and jax.process_index() == 0:
    print(f"skip    {source.skipped:,} items that cannot be read, from step {step:,} on: windows come in another order")
  identity["init_from"] = meta["init_from"]
  state = restored_state(config, mesh, checkpoints, step)
  return Start(step, state, meta["seconds"], tuple(meta["since_logged"]), identity)


def _same_folder(one: str, other: str) -> bool:
  """Tells whether two paths name the same folder, however they are written."""
  if not other or any(is_remote(path) or is_shipped(path) for path in (one, other)):
    return one.rstrip("/") == other.rstrip("/")
  return os.path.realpath(one) == os.path.realpath(other)


def _may_change_length(saved: Any, config: Config, step: int) -> bool:
  """Tells whether the first `step` steps would have been the same in a run of the length that is asked for now."""
  try:
    return step <= config.num_steps and same_rates(Config.from_dict(saved), config, step)
  except ConfigError:  # check_same_run says what has changed
    return False


def restored_state(config: Config, mesh: Mesh, checkpoints: Checkpoints, step: int | None = None) -> TrainState:
  """Restores the state saved at `step` (None: the newest whole checkpoint), laid out on any mesh.

  Raises:
    ConfigError: the mesh does not suit the model or the batch.
    CheckpointError: see `Checkpoints.restore`.
  """
  abstract = abstract_state(config, mesh)
  restored = checkpoints.restore(abstract.parameters, abstract.beside_parameters, step)
  number = jax.device_put(np.int32(restored.step), abstract.step.sharding)
  return abstract._replace(step=number, parameters=restored.params).with_beside_parameters(restored.opt_state)
