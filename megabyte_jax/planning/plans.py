"""Compiles a config's step for TPUs that need not exist, and reports its memory, communication and bounds."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from megabyte_jax.config import Config, MeshConfig
from megabyte_jax.config.levels import Remat
from megabyte_jax.display.progress import elapsed
from megabyte_jax.models.parameters import compute_dtype
from megabyte_jax.parallel import hardware
from megabyte_jax.parallel.sharding import check_mesh, make_mesh, parse_mesh
from megabyte_jax.planning import roofline
from megabyte_jax.planning.collectives import Collective, collectives
from megabyte_jax.planning.lowering import lower, memory_of

BETWEEN = " between slices"
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


def lay_out(config: Config, devices: list[jax.Device], step: str) -> tuple[Config, Mesh]:
  """Returns the config of a step on a TPU, and its mesh.

  Raises:
    ConfigError: the mesh does not suit the topology, the model or the batch.
  """
  config = for_tpu(config)
  mesh = make_mesh(config.mesh, devices)
  config = for_step(config, step, mesh.shape["data"] * mesh.shape["fsdp"])
  check_mesh(mesh, config.model, config.batch_size // config.accumulate, flags="--")
  return config, mesh


def state_bytes(config: Config, mesh: MeshConfig, step: str) -> float:
  """Returns the bytes of one device for the parameters and, in training, the optimizer's moments.

  All are float32, but for the parameters that generation has cast to the compute dtype. Those of norms, which it leaves
  float32, are too few to count apart.
  """
  values = 1 + config.optimizer.moments if step == "train" else 1
  width = compute_dtype(for_tpu(config).model).itemsize if step == "generate" else 4
  return width * values * config.model.parameter_count() / (mesh.fsdp * mesh.tensor)


def decoding_bytes(known: Config, total: float, one: Config) -> float:
  """Estimates from below what generation needs for `one`, given the `total` that it needs for `known`.

  Their meshes give the size of every axis. What decoding keeps of the rows is spread over `data` and `tensor` alone.
  As much as the parameters take may be something else, such as a copy of them: only the rest is scaled with the rows.
  """
  kept = max(0.0, total - 2 * state_bytes(known, known.mesh, "generate"))
  rows, known_rows = (each.batch_size / (each.mesh.data * each.mesh.tensor) for each in (one, known))
  return state_bytes(one, one.mesh, "generate") + kept * rows / known_rows


def remedies(plan: Plan) -> str:
  """Returns what to try where a step does not fit; parts are the fewest that promise to, by what the step needs."""
  config, mesh = plan.config, MeshConfig(**{"data": 1, **plan.mesh})
  replicas = mesh.data * mesh.fsdp
  found = []
  if plan.step == "train":
    rows = config.batch_size // replicas
    state = state_bytes(config, mesh, plan.step)
    more = [n for n in range(config.accumulate + 1, rows + 1) if rows % n == 0]
    if state > plan.memory:
      found.append("a larger fsdp")
    elif more:
      promising = (n for n in more if state + (plan.total - state) * config.accumulate / n < plan.memory)
      found.append(f"--accumulate={next(promising, more[-1])} (up to {rows} on this mesh)")
    if config.model.remat != "full":
      found.append("--remat=full")
  elif plan.step == "eval":
    found.append("a smaller --config.eval.batch_size")
  elif config.batch_size > replicas:
    found.append("a smaller --batch_size")
  if plan.step != "generate" and config.model.sequence_parts and replicas > 1:
    found.append("a larger seq with a smaller data" if mesh.data > 1 else "a larger seq with a smaller fsdp")
  return f"{', '.join([*found, 'more chips'])}, or --search"


def make_plan(
  config: Config, topology: str, devices: list[jax.Device], step: str = "train", *, quick: bool = False
) -> tuple[Plan, Any]:
  """Compiles one step for a topology.

  Args:
    config: the run, with its mesh and batch size.
    topology: its name (KIND:SIZE), for the report.
    devices: those of `topologies.topology_devices`.
    step: train | eval | generate.
    quick: asks XLA for little optimisation, which takes a third of the time or less. Communication is the same, memory
      up to a fifth smaller. That is enough to choose among meshes, but not to conclude that a step fits.

  Returns:
    The plan, and the executable, which is None where the step does not fit.

  Raises:
    ConfigError: the mesh does not suit the topology, the model or the batch.
  """
  config, mesh = lay_out(config, devices, step)
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
  started = time.perf_counter()
  executable = None
  try:
    with elapsed(f"compiling{' quickly' if quick else ''}"):
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
    plan.reason = "" if plan.fits else f"the step needs {plan.total / 2**30:.2f} GiB of {plan.memory / 2**30:.1f} GiB"
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
  reason = " ".join(text.split()).removeprefix("RESOURCE_EXHAUSTED: ").split(". ")[0][:200]
  plan.reason = re.sub(r"(\d)([KMGT])\b", r"\1 \2iB", reason)
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
    accumulate: parts of a step's batch; the config's stay, also with another batch_size.
    remat: rematerialisation policy of the model.
    mesh: axes as --mesh takes them, `fsdp=16,seq=4`.
  """
  steps = max(1, round(config.num_steps * config.batch_size / batch_size)) if batch_size else config.num_steps
  config = dataclasses.replace(
    config,
    batch_size=batch_size or config.batch_size,
    num_steps=steps,
    accumulate=accumulate or config.accumulate,
  )
  if remat:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
  return dataclasses.replace(config, mesh=parse_mesh(mesh)) if mesh else config


def axes_text(mesh: Mapping[str, int]) -> str:
  """Returns the axes of a mesh as --mesh takes them, `fsdp=16,seq=4`, without axes of one device."""
  return ",".join(f"{name}={size}" for name, size in mesh.items() if size > 1) or "one device"
