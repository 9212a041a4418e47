"""Loads a trained model: of a run, exported, or shipped with the package."""

from __future__ import annotations

from typing import Any, Literal

import jax
from jax.sharding import Mesh

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.exported import is_exported, read_exported
from megabyte_jax.checkpoints.saved_config import check_saved_config, load_config
from megabyte_jax.config import Config, MeshConfig
from megabyte_jax.errors import CheckpointError, ConfigError
from megabyte_jax.models.build import Model, abstract_model, parameter_info, trained_model
from megabyte_jax.parallel.sharding import make_mesh, shard_abstract


def load(
  workdir: str, step: int | Literal["best"] | None = None, mesh: Mesh | None = None
) -> tuple[Model, Config, int]:
  """Loads the model of a train.py run, or an exported or shipped one, with its parameters.

  Args:
    workdir: the run's folder, an exported model's, or `pretrained:NAME` for one that the package holds.
    step: which checkpoint; None takes the newest that is whole, "best" the one with the fewest validation bits per
      byte while training (see CheckpointConfig).
    mesh: where the parameters go; None puts all of them on the first device.

  Returns:
    The model (`trained_model`), the run's config, and the step.

  Raises:
    CheckpointError: there is no run, no such checkpoint, or it is damaged.
  """
  config = load_config(workdir)
  mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  _, abstract = abstract_model(config.model)
  abstract = shard_abstract(abstract, parameter_info(config.model), mesh)
  parameters, found = read_parameters(workdir, config, abstract, step)
  return trained_model(config.model, parameters), config, found


def read_parameters(
  workdir: str, config: Config, abstract_parameters: Any, step: int | Literal["best"] | None = None
) -> tuple[Any, int]:
  """Reads parameters alone, of a run's checkpoint or of an exported or shipped model.

  Args:
    workdir: the run's folder, an exported model's, or `pretrained:NAME`.
    config: as read from `workdir`.
    abstract_parameters: nested dicts of ShapeDtypeStructs with shardings.
    step: as in `load`; an exported model has one step alone.

  Returns:
    Nested dicts of arrays, and the step they are from.

  Raises:
    CheckpointError: there is no such checkpoint, it is damaged, its arrays are not those asked for, or it was trained
      with another model than `config` says.
  """
  if is_exported(workdir):
    parameters, found = read_exported(workdir, abstract_parameters)
    if step not in (None, found):
      raise CheckpointError(f"{workdir} is an exported model of step {found} alone; leave out --step={step}")
    return parameters, found
  with Checkpoints(workdir, read_only=True) as checkpoints:
    number = checkpoints.best_step() if step == "best" else step
    meta = checkpoints.meta(number, optimizer=False)
    check_saved_config(workdir, config, meta)
    restored = checkpoints.restore_params(abstract_parameters, meta["step"])
  return restored.params, restored.step


def describe_step(workdir: str, step: int, config: Config) -> str:
  """Returns how commands call the model that they read: `step 100 of runs/mine (of 400 steps)`, or without the last."""
  return f"step {step} of {workdir}" + (f" (of {config.num_steps:,} steps)" if step < config.num_steps else "")


def evaluation_mesh(config: MeshConfig) -> Mesh:
  """Makes the run's own mesh where it fits the devices that are here, else one with all of them on `fsdp`."""
  try:
    return make_mesh(config)
  except ConfigError:
    return make_mesh(MeshConfig(data=1, fsdp=-1))
