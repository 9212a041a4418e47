"""A trained model from its work directory."""

from __future__ import annotations

from typing import Literal

import jax
from jax.sharding import Mesh

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.saved_config import load_config
from megabyte_jax.config import Config, MeshConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.models.build import Model, abstract_model, trained_model
from megabyte_jax.parallel.sharding import make_mesh, shard_abstract


def load(
  workdir: str, step: int | Literal["best"] | None = None, mesh: Mesh | None = None
) -> tuple[Model, Config, int]:
  """The model of a train.py run, with the parameters of one of its checkpoints.

  Args:
    workdir: the run's folder.
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
  with Checkpoints(workdir, read_only=True) as checkpoints:
    number = checkpoints.best_step() if step == "best" else step
    restored = checkpoints.restore_params(shard_abstract(abstract, mesh), number)
  return trained_model(config.model, restored.params), config, restored.step


def evaluation_mesh(config: MeshConfig) -> Mesh:
  """The run's own mesh where it fits the devices that are here, else all of them on `fsdp`, which suits any model."""
  try:
    return make_mesh(config)
  except ConfigError:
    return make_mesh(MeshConfig(data=1, fsdp=-1))
