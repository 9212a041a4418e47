"""Compiles a config's step for TPUs that need not exist, and reports its memory, communication and bounds."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import jax

from megabyte_jax.config import Config
from megabyte_jax.config.levels import Remat
from megabyte_jax.errors import ConfigError, require
from megabyte_jax.parallel import hardware
from megabyte_jax.parallel.sharding import check_mesh, make_mesh, parse_mesh
from megabyte_jax.planning import roofline
from megabyte_jax.planning.collectives import Collective, collectives
from megabyte_jax.planning.lowering import lower, memory_of

BETWEEN = " between slices"
_LIBTPU = {  # environment variables that libtpu reads as it is loaded, unless they are set already
  "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud which TPU this machine has
  "TPU_WORKER_HOSTNAMES": "localhost",  # nor complain that it has none: a topology is what its name says
  "TPU_HOST_BOUNDS": "1,1,1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a training run on this machine may hold it
  "TPU_STDERR_LOG_LEVEL": "3",
}
_QUICK: dict[str, Any] = {"exec_time_optimization_effort": -1.0}  # Any: JAX declares texts and booleans alone


@dataclasses.dataclass
class Plan:
  """The result of compiling one step for a topology. Sizes are in bytes of one device.

  Attributes:
    fits: True if the step fits into the device's memory.
    reason: the compiler's explanation where it does not fit.
    memory: HBM of one device.
    arguments, output, temporaries, total: memory of the step; see `lowering.Memory`.
    wire: kind of collective -> (executions per step, bytes that each device sends); `KIND between slices` is traffic
      over the data centre's network.
    bounds: roofline of the step; None for generation, whose many small steps it does not describe.
    quick: True if compiled with little optimisation, so that the program differs slightly from a run's.
    seconds: time to compile.
  """

  config: Config
  step: str
  topology: str
  kind: str
  devices: int
  chips: int
  mesh: dict[str, int]
  memory: int
  fits: bool = False
  reason: str = ""
  arguments: int = 0
  output: int = 0
  temporaries: int = 0
  total: int = 0
  wire: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  bounds: roofline.Bounds | None = None
  quick: bool = False
  seconds: float = 0.0

  @property
  def days(self) -> float | None:
    """Days of training for the config's steps at the roofline's speed; None for other steps."""
    return self.config.num_steps * self.bounds.step / 86_400 if self.bounds and self.step == "train" else None


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Returns the devices of `slices` slices of `topology` (KIND:SIZE); none of them need exist.

  Raises:
    ConfigError: libtpu is missing, or does not know the topology.
  """
  require(importlib.util.find_spec("libtpu") is not None, 'planning for TPUs needs libtpu: pip install "jax[tpu]"')
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies  # noqa: PLC0415

  more = {"num_slices": slices} if slices > 1 else {}
  devices: list[jax.Device]
  try:
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
  except Exception as error:
    if advice := in_chips(topology):
      raise ConfigError(f"{topology} is not KIND:SIZE; {advice}") from None
    raise ConfigError(
      f"libtpu has no topology {topology!r}; write KIND:SIZE, such as v5p:4x4x4, v5e:16x16 or v6e:4x4 "
      f"(libtpu: {' '.join(str(error).split())[:300]})"
    ) from None
  require(hardware.is_known_tpu(devices[0]), f"hardware.py does not know {devices[0].device_kind}")
  return devices


def in_chips(name: str) -> str:
  """Returns what to write for a slice by its cloud name, `v5p-512` or `v5litepod-256`; "" where it is none."""
  found = re.fullmatch(r"(v4|v5p|v5litepod|v5e|v6e|tpu7x)[-:](\d+)", name)
  if not found:
    return ""
  kind, number = found[1].replace("v5litepod", "v5e"), int(found[2])
  chips = number // 2 if kind in ("v4", "v5p", "tpu7x") and "-" in name else number  # they count cores
  dimensions = 2 if kind in ("v5e", "v6e") else 3
  if chips < 4 or (chips > 256 and dimensions == 2):
    return ""
  sides = [1] * dimensions
  for doubling in range(chips.bit_length() - 1):
    sides[doubling % dimensions] *= 2
  if math.prod(sides) != chips:
    return f"write its {chips} chips as sides, such as {kind}:{'x'.join('4' * dimensions)}"
  return f"its {chips} chips are {kind}:{'x'.join(map(str, sorted(sides, key=lambda side: (side == 1, side))))}"


def for_tpu(config: Config) -> Config:
  """Returns the config with `auto` resolved to bfloat16, its meaning on a TPU rather than on this machine."""
  if config.model.compute_dtype != "auto":
    return config
  return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="bfloat16"))


def for_step(config: Config, step: str, replicas: int) -> Config:
  """Returns the config with the rows of a step as its batch_size, over so many replicas (`data` x `fsdp`).

  Evaluation pads the windows that it scores at once, which `windows_of` still tells, to whole replicas.
  """
  if step == "train":
    return config
  if step == "generate":
    return dataclasses.replace(config, accumulate=1)
  windows = windows_of(config, step)
  scored = dataclasses.replace(config.eval, batch_size=windows)
  return dataclasses.replace(config, batch_size=windows + -windows % replicas, accumulate=1, eval=scored)


def windows_of(config: Config, step: str) -> int:
  """Returns the windows of a step, without those that evaluation adds to fill its replicas."""
  return config.scored_at_once if step == "eval" else config.batch_size


def make_plan(
  config: Config, topology: str, devices: list[jax.Device], step: str = "train", *, quick: bool = False
) -> tuple[Plan, Any]:
  """Compiles one step for a topology.

  Args:
    config: the run, with its mesh and batch size.
    topology: its name (KIND:SIZE), for the report.
    devices: those of `topology_devices`.
    step: train | eval | generate.
    quick: asks XLA for little optimisation, which takes a third of the time or less. Communication is the same, memory
      up to a fifth smaller. That is enough to choose among meshes, but not to conclude that a step fits.

  Returns:
    The plan, and the executable, which is None where the step does not fit.

  Raises:
    ConfigError: the mesh does not suit the topology, the model or the batch.
  """
  config = for_tpu(config)
  mesh = make_mesh(config.mesh, devices)
  config = for_step(config, step, mesh.shape["data"] * mesh.shape["fsdp"])
  per_chip, chip = hardware.devices_per_chip(devices[0]), hardware.tpu_chip(devices[0])
  plan = Plan(
    config=config,
    step=step,
    topology=topology,
    kind=devices[0].device_kind,
    devices=len(devices),
    chips=len(devices) // per_chip,
    mesh=dict(mesh.shape),
    memory=int(chip.memory / per_chip),
    quick=quick,
  )
  check_mesh(mesh, config.model, config.batch_size // config.accumulate)
  started = time.perf_counter()
  executable = None
  try:
    executable = lower(config, mesh, step).compile(compiler_options=_QUICK if quick else None)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _read_shortage(plan, str(error))
  plan.seconds = time.perf_counter() - started
  found: list[Collective] = []
  if executable is not None:
    memory = memory_of(executable)
    plan.arguments, plan.temporaries, plan.output = memory
    plan.total = sum(memory)
    plan.fits = plan.total <= plan.memory
    plan.reason = "" if plan.fits else "the compiler used more than the device has"
    found = collectives(executable.as_text() or "")
    counts: Counter[str] = Counter()
    sent: dict[str, float] = defaultdict(float)
    for one in found:
      kind = one.kind + BETWEEN * one.between_slices
      counts[kind] += one.times
      sent[kind] += one.wire_bytes
    plan.wire = {kind: (counts[kind], sent[kind]) for kind in counts}
  if step != "generate" and executable is not None:
    within, between = (sum(one.wire_bytes for one in found if one.between_slices == far) for far in (False, True))
    plan.bounds = roofline.bounds(config, devices[0], len(devices), mesh.shape["tensor"], step, within, between)
  return plan, executable


def _read_shortage(plan: Plan, text: str) -> None:
  """Takes the needed memory and the reason from the compiler's error about a step that does not fit."""
  plan.reason = " ".join(text.split()).removeprefix("RESOURCE_EXHAUSTED: ").split(". ")[0][:200]
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  needed = re.search(r"(?:required[^(]*\(|Used )([\d.]+)([KMGT])", text)
  if needed:
    plan.total = int(float(needed[1]) * units[needed[2]])


def changed(
  config: Config, *, batch_size: int = 0, accumulate: int = 0, remat: Remat | Literal[""] = "", mesh: str = ""
) -> Config:
  """Returns the config with the given overrides; empty values and 0 change nothing.

  Args:
    config: the run.
    batch_size: rows per step; the number of steps changes with it, so that the bytes trained on stay the same.
    accumulate: parts of a step's batch.
    remat: rematerialisation policy of the model.
    mesh: axes as --mesh takes them, `fsdp=16,seq=4`.
  """
  if batch_size:
    steps = max(1, round(config.num_steps * config.batch_size / batch_size))
    config = dataclasses.replace(config, batch_size=batch_size, num_steps=steps, accumulate=1)
  if accumulate:
    config = dataclasses.replace(config, accumulate=accumulate)
  if remat:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
  return dataclasses.replace(config, mesh=parse_mesh(mesh)) if mesh else config


def axes_text(mesh: Mapping[str, int]) -> str:
  """Returns the axes of a mesh as --mesh takes them, `fsdp=16,seq=4`, without axes of one device."""
  return ",".join(f"{name}={size}" for name, size in mesh.items() if size > 1) or "one device"
