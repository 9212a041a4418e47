"""Names a checkpoint's arrays, says how they are stored, and checks that they are those of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from megabyte_jax.errors import CheckpointError
from megabyte_jax.parallel.parameter_info import parameter_name


def handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  """Returns the handler of each item, so that a checkpoint can be examined before it is restored."""
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for item in ("params", "opt_state"):
    arrays = ocp.handlers.StandardCheckpointHandler()
    registry.add(item, ocp.args.StandardSave, arrays)
    registry.add(item, ocp.args.StandardRestore, arrays)
  text = ocp.handlers.JsonCheckpointHandler()
  registry.add("meta", ocp.args.JsonSave, text)
  registry.add("meta", ocp.args.JsonRestore, text)
  return registry


def flat_arrays(tree: Any) -> dict[str, Any]:
  """Flattens a pytree to {dotted path: leaf}, in the order of its leaves."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {parameter_name(path): leaf for path, leaf in leaves}


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
  """Returns shape, dtype and sharding of a leaf; one without a sharding goes to the first local device."""
  sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_same_arrays(folder: epath.Path, wanted: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]) -> None:
  """Checks that a checkpoint has exactly the arrays of `wanted`; Orbax would cast or skip.

  Other items of the checkpoint are not looked at: they may be damaged.

  Args:
    folder: of the checkpoint.
    wanted: item -> {dotted path: array}.

  Raises:
    CheckpointError: arrays have other names, shapes or dtypes; names those that do.
  """
  lines = []
  for item, tree in wanted.items():
    metadata: Any = ocp.handlers.StandardCheckpointHandler().metadata(folder / item)
    saved = {name: _describe(leaf) for name, leaf in metadata.tree.items()}
    asked = {name: _describe(leaf) for name, leaf in tree.items()}
    for name in sorted(saved.keys() | asked.keys()):
      was, now = saved.get(name, "(absent)"), asked.get(name, "(absent)")
      if was != now:
        lines.append(f"  {item}: {name}: {was} -> {now}")
  if lines:
    shown = lines[:10] + [f"  and {len(lines) - 10} more"] * (len(lines) > 10)
    raise CheckpointError(
      f"{folder} does not fit this model and optimizer (saved -> needed):",
      *shown,
      "use the config of the run that saved it, or another --workdir",
    )


def _describe(leaf: Any) -> str:
  return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
