"""Lays out activations on a device mesh, whose axes are data, fsdp, seq and tensor (see sharding.py)."""

from __future__ import annotations

import functools
import math

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from megabyte_jax.errors import require
from megabyte_jax.parallel.backend import platform

AXES = ("data", "fsdp", "seq", "tensor")
BATCH = ("data", "fsdp")  # the axes that rows are spread over


def mesh_axes() -> dict[str, int]:
  """Returns the sizes of the axes, by name, over which XLA spreads arrays on the mesh that `jax.set_mesh` set.

  Empty without a mesh. Not among them are axes within `jax.shard_map`, where each device has arrays of its own, and
  those of type Explicit, along which JAX wants every array's layout from the program that set the mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
  return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


def refuse_explicit_axes(x: jax.Array, what: str) -> None:
  """Raises ConfigError where an array is cut along Explicit axes of a mesh.

  Args:
    x: the array, traced or not.
    what: the subject and verb of the message, such as "the input lies".
  """
  spec = getattr(jax.typeof(x).sharding, "spec", ())
  require(
    not any(spec or ()),
    f"{what} on Explicit axes of a mesh ({spec}); give the mesh Auto ones, as in jax.make_mesh(sizes, names, "
    "axis_types=(jax.sharding.AxisType.Auto,) * len(names))",
  )


def lay_out(x: jax.Array, spec: P) -> jax.Array:
  """Lays an array out on the mesh that is set; nothing without one.

  On a mesh of the user's own, axes that it has not, or that do not divide the array, are left out of `spec`.
  """
  axes = mesh_axes()
  if not axes:
    return x
  if not axes.keys() >= set(AXES):
    fitting = []
    for size, entry in zip(x.shape, spec, strict=False):
      names = [name for name in ((entry,) if isinstance(entry, str) else entry or ()) if name in axes]
      fitting.append(tuple(names) if names and size % math.prod(axes[name] for name in names) == 0 else None)
    if not any(fitting):
      return x
    spec = P(*fitting)
  return jax.lax.with_sharding_constraint(x, spec)


def spec_of(x: jax.Array | jax.ShapeDtypeStruct, *others: str | None) -> P:
  """Returns how rows of x, [B, N, M, ..], lie on a mesh, and the given axes after them.

  Of a single span, the first level's, the slots are spread over `seq`; of several whole spans are, so that they need no
  communication.
  """
  return P(BATCH, *((None, "seq") if x.shape[1] == 1 else ("seq", None)), *others)


def row_major(x: jax.Array, spec: P | None = None) -> jax.Array:
  """Returns x, of any shape, in row-major layout on GPUs, where XLA would otherwise transpose arrays between products.

  On a mesh each device constrains its own part: XLA (JAX 0.10.2) gathers a whole array that it is to constrain. What
  the mesh does not divide is left as it is.

  Args:
    spec: how x lies on the mesh that may be set; without it x is left as it is there.
  """
  if platform() != "gpu":
    return x
  constrained = functools.partial(with_layout_constraint, layouts=Layout(major_to_minor=tuple(range(x.ndim))))
  axes = mesh_axes()
  if math.prod(axes.values()) == 1:
    return constrained(x)
  if spec is None or not axes.keys() >= set(AXES) or not divides(axes, spec, x.shape):
    return x
  return jax.shard_map(constrained, in_specs=spec, out_specs=spec)(x)


def divides(axes: dict[str, int], spec: P, shape: tuple[int, ...]) -> bool:
  """Returns whether axes of these sizes cut an array into equal parts, if it is spread over them as `spec` says."""
  parts = (math.prod(axes[name] for name in ((entry,) if isinstance(entry, str) else entry or ())) for entry in spec)
  return not any(size % count for size, count in zip(shape, parts, strict=False))
