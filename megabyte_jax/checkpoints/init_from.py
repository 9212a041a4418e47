"""Starts a new run from another run's parameters, also with a longer context."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from megabyte_jax.checkpoints.arrays import flat_arrays
from megabyte_jax.checkpoints.saved_config import changed_keys, load_config
from megabyte_jax.checkpoints.trained_model import read_parameters
from megabyte_jax.config import Config
from megabyte_jax.errors import CheckpointError
from megabyte_jax.models.build import abstract_model, parameter_info
from megabyte_jax.parallel.parameter_info import ParameterInfos
from megabyte_jax.parallel.sharding import shard_abstract


def parameters_from(workdir: str, fresh: Any, config: Config, mesh: Mesh) -> Any:
  """Reads the newest parameters of the run in `workdir`, for the model that `fresh` belongs to.

  All arrays must have the new model's shapes, but for byte positions: where the new context (or span) is
  longer, the positions beyond the old ones keep their fresh initial values; where it is shorter, the
  first ones are taken.

  Args:
    fresh: the new model's initial parameters, laid out on `mesh`.
    config: of the new run; settings of the model that differ, such as the activation, are printed.

  Raises:
    CheckpointError: there is no such run, or its model has other arrays; names those that differ.
  """
  before = load_config(workdir)
  if other := [key for key in changed_keys(before.to_dict(), config.to_dict()) if key.startswith("model.")]:
    print(f"settings of the model that are not those of {workdir}: {', '.join(other)}")
  _, abstract = abstract_model(before.model)
  infos = parameter_info(before.model)
  old, new = (_shapes(parameters, infos) for parameters in (abstract, fresh))
  differ = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
  if differ:
    raise CheckpointError(
      f"the model of {workdir} does not fit this config; different: {', '.join(sorted(differ)[:8])}"
    )
  parameters, step = read_parameters(workdir, before, shard_abstract(abstract, infos, mesh))
  print(f"start   parameters of {workdir}, step {step}")

  def fit(new: jax.Array, old: jax.Array) -> jax.Array:
    rows = min(len(old), len(new)) if new.ndim else 0
    return old if new.shape == old.shape else jax.device_put(new.at[:rows].set(old[:rows]), new.sharding)

  return jax.tree.map(fit, fresh, parameters)


def _shapes(parameters: Any, infos: ParameterInfos) -> dict[str, tuple[int, ...]]:
  """Returns shapes by name; of byte positions only the width, since their number may differ."""
  return {
    name: leaf.shape[1:] if name in infos and infos[name].kind == "positions" else leaf.shape
    for name, leaf in flat_arrays(parameters).items()
  }
