"""Looks up the peak rates of devices and measures the memory in use."""

from __future__ import annotations

import dataclasses
import re
import resource
import sys
from collections.abc import Iterable

import jax

# Nominal bfloat16 FLOP/s of dense matrix products, without structured sparsity. Those of v4, v5e, v5p, v6e and TPU7x
# agree with docs.cloud.google.com/tpu/docs (copies read on 2026-11-23); the other entries were not checked.
_TPU_CORE = {  # of one TensorCore: a device is one or, on most v4 and v5p systems, two of a chip's cores
  "TPU v2": 23e12,
  "TPU v3": 61.5e12,
  "TPU v4": 137.5e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 229.5e12,
  "TPU v5p": 229.5e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
}


@dataclasses.dataclass(frozen=True)
class TpuChip:
  """Memory and links of one TPU chip, as documented: inputs of an estimate, none of them measured.

  Memory is the limit that libtpu 0.0.42.1 states for a program ("exceeds available HBM"), summed over cores: a little
  less than the documented 16, 32 and 192 GiB. It grants 95.74 GiB to v5p; the documented 95 are taken. Other figures
  are from docs.cloud.google.com/tpu/docs (copies read on 2026-11-23). These give 400 (v5e), 1200 (v5p), 800 (v6e) and
  1200 GB/s (TPU7x) for all links of a chip, both directions together. Half of that is shared by four links or, in a
  three-dimensional torus, by six. The links of v4 are unverified. The data centre's network has 50 (v5p), 100 (v6e) and
  100 Gbit/s (TPU7x) per chip by the page on TPU7x, and 6.4 Tbit/s for the 256 chips of v5e; v4's is not documented.

  Attributes:
    cores: TensorCores; a device is one or both of them.
    memory: bytes of HBM that programs may use.
    memory_rate: bytes per second of HBM.
    link_rate: bytes per second of one inter-chip link in one direction.
    network_rate: bytes per second of the chip's share of the data centre's network; None if unknown.
  """

  cores: int
  memory: float
  memory_rate: float
  link_rate: float
  network_rate: float | None


_GIB = 2**30
_TPU_CHIP = {
  "TPU v4": TpuChip(2, 30.75 * _GIB, 1.2e12, 45e9, None),
  "TPU v5 lite": TpuChip(1, 15.75 * _GIB, 819e9, 50e9, 3.125e9),
  "TPU v5": TpuChip(2, 95 * _GIB, 2.765e12, 100e9, 6.25e9),
  "TPU v6 lite": TpuChip(1, 31.25 * _GIB, 1.638e12, 100e9, 12.5e9),
  "TPU7x": TpuChip(2, 189.5 * _GIB, 7.38e12, 100e9, 12.5e9),
}
_GPU = (  # the first whose words are in the device's name
  ("GB300", 2500e12),
  ("GB200", 2500e12),
  ("B300", 2250e12),
  ("B200", 2250e12),
  ("GH200", 989e12),
  ("H200 NVL", 835e12),
  ("H200", 989e12),
  ("H100 NVL", 835e12),
  ("H100 PCIe", 756e12),
  ("H100", 989e12),
  ("A100", 312e12),
  ("A30", 165e12),
  ("A10G", 70e12),
  ("A10", 125e12),
  ("L40S", 362e12),
  ("L40", 181e12),
  ("L4", 121e12),
  ("RTX 4090", 165e12),
  ("RTX 3090", 71e12),
)


def peak_flops(device: jax.Device) -> float | None:
  """Returns the nominal bfloat16 FLOP/s of `device`; None if unknown, as for a CPU."""
  kind = device.device_kind
  if kind in _TPU_CORE:
    return _TPU_CORE[kind] * getattr(device, "num_cores", 1)
  return next((peak for name, peak in _GPU if re.search(rf"\b{name}\b", kind)), None)


def is_known_tpu(device: jax.Device) -> bool:
  """Returns True if `tpu_chip` has an entry for the device."""
  return device.device_kind in _TPU_CHIP


def tpu_chip(device: jax.Device) -> TpuChip:
  """Returns the chip that `device` is, or of which it is one core; raises KeyError for any other device."""
  return _TPU_CHIP[device.device_kind]


def devices_per_chip(device: jax.Device) -> int:
  """Returns the devices per chip: two for tpu7x, one for all others that `plan` knows."""
  return tpu_chip(device).cores // getattr(device, "num_cores", 1) if is_known_tpu(device) else 1


def memory_in_use(devices: Iterable[jax.Device]) -> int | None:
  """Returns the peak bytes used so far on any of this process's `devices`; None if unknown.

  On CPU it is the peak memory of the process.
  """
  peaks = []
  for device in devices:
    if device.process_index != jax.process_index():
      continue
    if device.platform == "cpu":
      held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      peaks.append(held if sys.platform == "darwin" else held * 1024)
    else:
      peaks.append((device.memory_stats() or {}).get("peak_bytes_in_use", 0))
  return max(peaks, default=0) or None
