"""Makes the device mesh and maps the logical axes of parameters to it, by one table.

Axes: `data` replicates the model, `fsdp` also shards its parameters, `seq` spreads a sequence's patches,
`tensor` spreads heads and feed-forward units. All four always exist; unused ones have size 1. XLA adds the
communication (sharding in Auto mode).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from megabyte_jax.config import MeshConfig, ModelConfig
from megabyte_jax.errors import ConfigError, require
from megabyte_jax.parallel.activation_layout import AXES, BATCH, row_major
from megabyte_jax.parallel.parameter_info import ParameterInfo, ParameterInfos, map_with_info

# Logical axes of parameters (parameter_info.py) -> axes of the mesh. An axis that is not here is not cut: layers, byte
# values, positions, and `channels`, the width of vectors such as norms, which are too small for it.
MESH_AXES = {"width": "fsdp", "byte_width": "fsdp", "heads": "tensor", "hidden": "tensor"}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """Makes the mesh over `devices` (default: all).

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or slices of TPUs are not replicas.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.asdict(config)
  fixed = math.prod(size for size in sizes.values() if size > 0)
  free = [name for name, size in sizes.items() if size == -1]
  require(
    len(devices) % fixed == 0 and (bool(free) or fixed == len(devices)),
    f"config.mesh {sizes} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}"
    + (f"; the fixed ones multiply to {fixed}" if free else "")
    + f"; {_sizes_that_fit(sizes, len(devices))}",
  )
  for name in free:
    sizes[name] = len(devices) // fixed
  shape, names, types = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes)
  slices = Counter(getattr(device, "slice_index", 0) for device in devices)
  if len(slices) > 1:
    # Between slices of TPUs there is only the data centre's network: nothing but replicas' gradients goes over it.
    # XLA calls every host of GPUs a slice; their network is made for more, so any mesh will do.
    replicas = sizes["data"] % len(slices) == 0 and len(set(slices.values())) == 1
    if not replicas:
      require(
        devices[0].platform != "tpu",
        f"config.mesh.data is {sizes['data']} on {len(slices)} slices; they hold replicas, so take a multiple of "
        f"{len(slices)}",
      )
      in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
      return Mesh(np.array(in_order).reshape(shape), names, axis_types=types)
    within = (sizes["data"] // len(slices), *shape[1:])
    across = (len(slices), *(1 for _ in shape[1:]))
    hybrid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(hybrid, names, axis_types=types)
  try:
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)
  except NotImplementedError:  # an axis is not a product of whole axes of the TPU's torus: cut one of them
    cut = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(cut, names, axis_types=types)


def parse_mesh(text: str, data: int = -1) -> MeshConfig:
  """Parses a mesh such as `fsdp=16,seq=4`. Axes left out are 1, `data` is `data`, or 1 if another axis is -1.

  Raises:
    ConfigError: there is another axis, or something that is not a size.
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = part.partition("=")
    known = name in {field.name for field in dataclasses.fields(MeshConfig)}
    require(
      known and re.fullmatch(r"-?\d+", size) is not None,
      f"--mesh={text}: {part!r} is not the size of data, fsdp, seq or tensor; write it like fsdp=16,seq=4",
    )
    require(name not in sizes, f"--mesh={text}: {name} is given twice; leave one out")
    sizes[name] = int(size)
  sizes.setdefault("data", 1 if -1 in sizes.values() else data)
  return MeshConfig(**sizes)


def _sizes_that_fit(sizes: dict[str, int], count: int) -> str:
  """Says which size of one axis would make `sizes` fit `count` devices."""
  fixed = math.prod(size for size in sizes.values() if size > 0)
  fits = []
  for name, size in sizes.items():
    left, over = divmod(count, fixed // size if size > 0 else count + 1)
    if left and not over:
      fits += [f"{name}={n}" for n in (_divisors(left) if -1 in sizes.values() else (left,)) if n != size]
  if not fits:
    return f"each must be one of {_divisors(count)}"
  return f"{' or '.join(fits)} would fit" + ("" if -1 in sizes.values() else "; -1 takes what is left")


def _divisors(count: int) -> list[int]:
  return [n for n in range(1, count + 1) if count % n == 0]


def check_mesh(mesh: Mesh | AbstractMesh, model: ModelConfig, batch_size: int, *, flags: str = "--config.") -> None:
  """Raises ConfigError, naming sizes that would fit, unless the model and batch can be spread over the mesh.

  Args:
    mesh, model: what is spread over what.
    batch_size: rows that are worked through at once.
    flags: how the flags that the error recommends begin.
  """
  sizes = {axis: mesh.shape.get(axis, 1) for axis in AXES}  # a mesh of the user's own may lack some
  spread = {
    "batch_size (per accumulation step)": (
      batch_size,
      sizes["data"] * sizes["fsdp"],
      "mesh.data * mesh.fsdp",
    ),
  }
  parts, seq = model.sequence_parts, sizes["seq"]
  if parts:
    spread["the number of patches (context / patch size)"] = (parts, seq, "mesh.seq")
  else:
    require(seq == 1, f"mesh.seq is {seq}, but {model.display_name}'s sequences are not spread; set it to 1")
  for i, level in enumerate(model.levels):
    spread[f"levels[{i}].num_heads"] = (level.num_heads, sizes["tensor"], "mesh.tensor")
    spread[f"levels[{i}] feed-forward width"] = (model.hidden(level), sizes["tensor"], "mesh.tensor")
    spread[f"levels[{i}].width"] = (level.width, sizes["fsdp"], "mesh.fsdp")
  for what, (size, parts, axis) in spread.items():
    if size % parts:
      fits = [n for n in _divisors(mesh.size) if size % n == 0]
      below = size - size % parts
      larger = (f"{below} or " if below else "") + str(below + parts)
      flag = f"{larger} here"
      if "batch_size" in what:
        flag = f"fewer devices, or {flags}batch_size={larger} (times {flags}accumulate, which could be smaller, too)"
      raise ConfigError(
        f"{what} is {size}, which {axis} = {parts} does not divide; {axis} could be {fits}, or take {flag}"
      )


def parameter_spec(info: ParameterInfo, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
  """Returns the partition spec of a parameter or moment; a mesh axis that does not divide its axis is left out."""
  wanted = (MESH_AXES.get(axis) for axis in info.axes)
  spec = [
    axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(wanted, shape, strict=True)
  ]
  return P(*spec) if any(spec) else P()


def _with_specs(place: Callable[[Any, P], Any], tree: Any, infos: ParameterInfos, mesh: Mesh | AbstractMesh) -> Any:
  """Returns place(leaf, its spec) for every parameter or moment of the tree; whatever else there is gets replicated."""
  return map_with_info(
    lambda leaf, info: place(leaf, P() if info is None else parameter_spec(info, leaf.shape, mesh)), tree, infos
  )


def shard_abstract(tree: Any, infos: ParameterInfos, mesh: Mesh) -> Any:
  """Returns the same tree of ShapeDtypeStructs, each with its NamedSharding.

  Args:
    tree: parameters or a whole training state, as nested containers of shapes.
    infos: what the model's parameters declare (`models.build.parameter_info`).
  """

  def place(leaf, spec):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  return _with_specs(place, tree, infos, mesh)


def constrain_state(tree: Any, infos: ParameterInfos) -> Any:
  """Lays parameters or moments out as declared: XLA may choose otherwise, and the next step be compiled again."""
  mesh = jax.sharding.get_abstract_mesh()
  return tree if mesh.empty else _with_specs(jax.lax.with_sharding_constraint, tree, infos, mesh)


def lay_out_gradient(gradient: Any, infos: ParameterInfos) -> Any:
  """Lays the gradient of parameters that `fsdp` spreads out row-major, as they lie themselves.

  XLA for GPUs scatters sums along the first axis in memory, and would transpose parameters and moments to match.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return gradient if mesh.shape.get("fsdp", 1) == 1 else _with_specs(row_major, gradient, infos, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of byte arrays [B, T]. Each device of a sequence holds all bytes of its rows."""
  return NamedSharding(mesh, P(BATCH))
