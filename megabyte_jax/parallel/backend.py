"""Tells the kind of device that a program is compiled for, and adapts arrays and kernels to it."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def platform() -> str:
  """Returns cpu, gpu or tpu: the platform of the mesh that is set, which need not be local, or JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def row_major(x: jax.Array) -> jax.Array:
  """Constrains x to row-major layout on GPUs, where XLA would otherwise transpose arrays between products."""
  if platform() != "gpu":
    return x
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


@functools.cache
def triton() -> Any:
  """Imports Pallas's deprecated Triton backend, which only GPU kernels need; returns None if JAX has none."""
  try:
    from jax.experimental.pallas import triton as part  # noqa: PLC0415
  except ImportError:
    return None
  return part
