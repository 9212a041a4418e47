"""Finds the devices of TPU topologies that need not exist, by libtpu, and says which names and sides there are."""

from __future__ import annotations

import importlib.util
import math
import os
import re

import jax

from megabyte_jax.errors import ConfigError, require
from megabyte_jax.parallel import hardware

_LIBTPU = {  # environment variables that libtpu reads as it is loaded, unless they are set already
  "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud which TPU this machine has
  "TPU_WORKER_HOSTNAMES": "localhost",  # nor complain that it has none: a topology is what its name says
  "TPU_HOST_BOUNDS": "1,1,1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a training run on this machine may hold it
  "TPU_STDERR_LOG_LEVEL": "3",
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7": "tpu7x", "v7x": "tpu7x"}
_FLAT = ("v5e", "v6e")  # two-dimensional; libtpu ends the process as it compiles for other sides of v5e
_LONGEST = 16  # chips on a side of these


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Returns the devices of `slices` slices of `topology` (KIND:SIZE); none of them need exist.

  Raises:
    ConfigError: libtpu is missing, or there is no such topology.
  """
  require(importlib.util.find_spec("libtpu") is not None, 'planning for TPUs needs libtpu: pip install "jax[tpu]"')
  if advice := in_chips(topology):
    raise ConfigError(f"there is no topology {topology}: {advice}")
  kind, _, size = topology.partition(":")
  if kind in _FLAT and re.fullmatch(r"\d+(x\d+)*", size):
    sides = [int(side) for side in size.split("x")]
    require(
      len(sides) == 2 and max(sides) <= _LONGEST,
      f"there is no topology {topology}: slices of {kind} have two sides of at most {_LONGEST} chips, such as "
      f"{kind}:4x4 or {kind}:16x16; --slices joins several",
    )
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies  # noqa: PLC0415

  more: dict[str, object] = {"num_slices": slices} if slices > 1 else {}
  if kind == "v4":
    more["chip_config_name"] = "megacore"  # a device is a chip, as on Cloud TPUs; libtpu's default is half a chip
  devices: list[jax.Device]
  try:
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
  except Exception as error:
    reason = " ".join(str(error).split())[:300]
    raise ConfigError(
      f"libtpu has no topology {topology!r}; plan is for TPUs: write KIND:SIZE, such as v5p:4x4x4, v5e:16x16 or v6e:4x4"
      + ("" if "regex" in reason else f" (libtpu: {reason})")
    ) from None
  require(hardware.is_known_tpu(devices[0]), f"hardware.py does not know {devices[0].device_kind}")
  return devices


def in_chips(name: str) -> str:
  """Returns what to write for a slice by its cloud name, `v5p-512` or `v5litepod-256`; "" where it is none."""
  kind, separator, size = re.fullmatch(r"(\w*)([-:]?)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
  alias, kind = kind, _ALIASES.get(kind, kind)
  if kind not in (*_FLAT, "v4", "v5p", "tpu7x"):
    return ""
  if separator == ":" and alias != kind and "x" in size:
    return f"write {kind}:{size}"
  if not separator or not re.fullmatch(r"\d+", size):
    return ""
  chips = int(size) // 2 if kind not in _FLAT and separator == "-" else int(size)  # the names count cores
  dimensions = 2 if kind in _FLAT else 3
  if chips < 4 or (chips > _LONGEST**2 and dimensions == 2):
    return ""
  sides = [1] * dimensions
  for doubling in range(chips.bit_length() - 1):
    sides[doubling % dimensions] *= 2
  if math.prod(sides) != chips:
    return f"write its {chips} chips as sides, such as {kind}:{'x'.join('4' * dimensions)}"
  return f"its {chips} chips are {kind}:{'x'.join(map(str, sorted(sides, key=lambda side: (side == 1, side))))}"
