"""Starts a new run from another run's parameters, also with a longer context."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from megabyte_jax.checkpoints.arrays import flat_arrays
from megabyte_jax.checkpoints.saved_config import (
  CONFIG_FILE,
  SHIPPED,
  SHIPPED_CONFIGS,
  all_differences,
  is_absent,
  is_shipped,
  load_config,
  matters,
)
from megabyte_jax.checkpoints.trained_model import read_parameters
from megabyte_jax.config import Config
from megabyte_jax.errors import CheckpointError
from megabyte_jax.models.build import abstract_model, parameter_info
from megabyte_jax.parallel.parameter_info import ParameterInfos
from megabyte_jax.parallel.sharding import shard_abstract

_MAY_DIFFER = ("model.context", "model.dropout")  # which change no array but byte positions


def parameters_from(workdir: str, fresh: Any, config: Config, mesh: Mesh) -> Any:
  """Reads the newest parameters of the run in `workdir`, for the model that `fresh` belongs to.

  All arrays must have the new model's shapes, but for byte positions: where the new context (or span) is
  longer, the positions beyond the old ones keep their fresh initial values; where it is shorter, the
  first ones are taken.

  Args:
    fresh: the new model's initial parameters, laid out on `mesh`.
    config: of the new run; settings of the model that differ, such as the activation, are printed.

  Raises:
    CheckpointError: there is no such run, or its model has other arrays; says which config has those, and names
      arrays where no setting differs.
  """
  before = load_config(workdir)
  pairs = all_differences(before.to_dict(), config.to_dict())
  other = {key: values for key, values in sorted(pairs.items()) if key.startswith("model.") and matters(key)}
  _, abstract = abstract_model(before.model)
  infos = parameter_info(before.model)
  old, new = (_shapes(parameters, infos) for parameters in (abstract, fresh))
  differ = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
  if differ and other:
    raise CheckpointError(f"the model of {workdir} does not fit this config; {_remedy(workdir, other)}")
  if differ:
    raise CheckpointError(
      f"the model of {workdir} does not fit this config; different: {', '.join(sorted(differ)[:8])}"
    )
  if other:
    print(f"settings of the model that are not those of {workdir}: {', '.join(other)}")
  parameters, step = read_parameters(workdir, before, shard_abstract(abstract, infos, mesh))
  print(f"start   parameters of {workdir}, step {step}")

  def fit(new: jax.Array, old: jax.Array) -> jax.Array:
    rows = min(len(old), len(new)) if new.ndim else 0
    return old if new.shape == old.shape else jax.device_put(new.at[:rows].set(old[:rows]), new.sharding)

  return jax.tree.map(fit, fresh, parameters)


def _remedy(workdir: str, other: Mapping[str, tuple[Any, Any]]) -> str:
  """Says which config has the sizes of the model of `workdir`; `other`: settings that differ, saved and given."""
  name = os.fspath(workdir).removeprefix(SHIPPED)
  if is_shipped(workdir) and name in SHIPPED_CONFIGS:
    return f"give --config={SHIPPED_CONFIGS[name]}, which has its sizes"
  if any(is_absent(value) for values in other.values() for value in values):  # another family or number of levels
    return f"give the --config that it was trained with; {os.path.join(workdir, CONFIG_FILE)} has its settings"
  given = {key: tuple(was) if isinstance(was, list) else was for key, (was, _) in other.items()}
  flags = (shlex.quote(f"--config.{key}={value}") for key, value in given.items() if key not in _MAY_DIFFER)
  return f"give the --config that it was trained with, or its settings: {' '.join(flags)}"


def _shapes(parameters: Any, infos: ParameterInfos) -> dict[str, tuple[int, ...]]:
  """Returns shapes by name; of byte positions only the width, since their number may differ."""
  return {
    name: leaf.shape[1:] if name in infos and infos[name].kind == "positions" else leaf.shape
    for name, leaf in flat_arrays(parameters).items()
  }
