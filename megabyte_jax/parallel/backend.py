"""What kind of device the program at hand is compiled for, and what that means for its arrays and kernels."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def platform() -> str:
  """What the program at hand is for: cpu, gpu or tpu; that of the mesh set, which need not be of this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def row_major(x: jax.Array) -> jax.Array:
  """x, on a GPU in memory in the order of its axes: left to itself, XLA transposes arrays between products there."""
  if platform() != "gpu":
    return x
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


@functools.cache
def triton() -> Any:
  """Pallas's part for Triton, or None where JAX has none: it is deprecated, and only kernels for GPUs need it."""
  try:
    from jax.experimental.pallas import triton as part  # noqa: PLC0415
  except ImportError:
    return None
  return part
