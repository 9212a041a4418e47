"""Tells the kind of device that a program is compiled for, and what it can do."""

from __future__ import annotations

import functools
from typing import Any

import jax

_LEAST_CAPABILITY = 8.0  # of GPUs whose matrix units know bfloat16


def platform() -> str:
  """Returns cpu, gpu or tpu: the platform of the mesh that is set, which need not be local, or JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def nvidia_obstacle(kind: str) -> str:
  """Returns why a kernel for NVIDIA GPUs cannot run on a kind of device, as `platform` names it, or '' if it can."""
  if kind != "gpu":
    return f"the device is {kind}, not an NVIDIA GPU"
  if jax.default_backend() != "gpu":  # a program for a GPU elsewhere, which is taken to be able to
    return ""
  device = jax.devices()[0]
  if "rocm" in device.client.platform_version.lower():
    return "the GPU is not NVIDIA's"
  capability = float(device.compute_capability)
  if capability < _LEAST_CAPABILITY:
    return f"the GPU has compute capability {capability}, below {_LEAST_CAPABILITY}"
  return ""


@functools.cache
def triton() -> Any:
  """Imports Pallas's deprecated Triton backend, which only GPU kernels need; returns None if JAX has none."""
  try:
    from jax.experimental.pallas import triton as part  # noqa: PLC0415
  except ImportError:
    return None
  return part
