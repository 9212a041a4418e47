"""What a run would need on TPUs, found without one: the real step is compiled ahead of time for a topology.

  python -m megabyte_jax.plan --config=configs/paper/table5.py:image640_megabyte --topology=v5p:4x4x4
  python -m megabyte_jax.plan --config=... --topology=v6e:16x16 --mesh=fsdp=64,seq=4 --batch_size=128 --remat=named
  python -m megabyte_jax.plan --config=... --topology=v5e:16x16 --search       # tries meshes, batch sizes, remat
  python -m megabyte_jax.plan --config=... --step=generate --json              # train (default), eval or generate
  python -m megabyte_jax.plan --config=... --save=step.pickle                  # keeps the executable; see `save`

Needs libtpu, not a TPU: pip install "jax[tpu]". Topologies have the form KIND:SIZE, with sizes of chips: v4:2x2x2,
v5e:4x4 ... 16x16, v5p:2x2x1 ..., v6e:4x4 ... 16x16, tpu7x:2x2x1 ... . Devices of v4 and tpu7x are half a chip.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import pickle
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import config_flags

from megabyte_jax import command_line, flops, hardware, roofline, sampling
from megabyte_jax.atomic_file import replacing
from megabyte_jax.collectives import Collective, collectives
from megabyte_jax.command_line import parse_mesh
from megabyte_jax.config import Config, ConfigError, PerceiverARConfig
from megabyte_jax.config_parsing import require
from megabyte_jax.models.build import abstract_model, cast_for_decoding
from megabyte_jax.models.config import Remat
from megabyte_jax.outputs import check_output_file
from megabyte_jax.progress import duration, human
from megabyte_jax.sharding import batch_sharding, check_mesh, make_mesh, shard_abstract
from megabyte_jax.train_state import abstract_state, make_eval_step, make_train_step

STEPS = ("train", "eval", "generate")
_GIB = 2**30
_BETWEEN = " between slices"
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
  """What compiling one step for a topology showed. Sizes are bytes of one device.

  Attributes:
    fits: whether the compiler found room for the step.
    reason: why it does not fit, in the compiler's words.
    memory: HBM of one device.
    arguments, output, temporaries, total: of the step; output that reuses arguments' memory is not counted twice.
    wire: kind of collective -> (how many run in a step, bytes that each device sends); `KIND between slices` for what
      goes over the data centre's network.
    bounds: roofline of the step; None for generation, whose many small steps it does not describe.
    quick: compiled with little optimisation, so not quite the program of a run.
    seconds: it took to compile.
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
    """Of training for the config's steps at the roofline's speed."""
    return self.config.num_steps * self.bounds.step / 86_400 if self.bounds and self.step == "train" else None


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """The devices of `topology` (KIND:SIZE), `slices` times; none of them need exist.

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
    text = " ".join(str(error).split())[:300]
    raise ConfigError(f"libtpu has no topology {topology!r} ({text}); try v5p:4x4x4, v5e:16x16 or v6e:4x4") from None
  require(hardware.is_known_tpu(devices[0]), f"hardware.py does not know {devices[0].device_kind}")
  return devices


def for_tpu(config: Config) -> Config:
  """The config with the dtype that `auto` means on a TPU: this machine's own would be another."""
  if config.model.compute_dtype != "auto":
    return config
  return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="bfloat16"))


def lower(config: Config, mesh: Mesh, step: str) -> jax.stages.Lowered:
  """The step for abstract arguments laid out as in a real run: nothing is allocated."""
  is_perceiver = isinstance(config.model, PerceiverARConfig)
  may_be_short = config.data.documents == "whole" or config.data.form == "image"

  def rows(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

  x_BT, length_B = rows((config.batch_size, config.model.context), jnp.uint8), rows((config.batch_size,), jnp.int32)
  with jax.set_mesh(mesh):
    if step == "train":
      return make_train_step(config).lower(abstract_state(config, mesh), x_BT, length_B if may_be_short else None)
    _, parameters = abstract_model(config.model)
    if step == "eval":
      parameters = shard_abstract(parameters, mesh)
      return make_eval_step(config).lower(parameters, x_BT, length_B, *([length_B] if is_perceiver else []))
    parameters = jax.eval_shape(functools.partial(cast_for_decoding, config.model), parameters)
    return _lower_generate(config, mesh, shard_abstract(parameters, mesh))


def _lower_generate(config: Config, mesh: Mesh, parameters: Any) -> jax.stages.Lowered:
  """Decoding of one chunk of bytes for `batch_size` rows, caches full."""
  graph, _ = abstract_model(config.model)
  batch, context = config.batch_size, config.model.context
  x_BT = jax.ShapeDtypeStruct((batch, context), jnp.int32, sharding=NamedSharding(mesh, sampling.row_spec(2)))
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  where = (scalar, scalar) if isinstance(config.model, PerceiverARConfig) else (scalar,)
  state = jax.eval_shape(lambda p, x, *where: nnx.merge(graph, p).read_prompt(x, *where), parameters, x_BT, *where)

  def place(leaf):
    sharding = NamedSharding(mesh, sampling.row_spec(len(leaf.shape)))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  arguments = (parameters, jax.tree.map(place, state), x_BT, scalar, scalar, scalar, keys_B)
  return sampling.decode_chunk.lower(graph, sampling.Sampling(), sampling.chunk_bytes(config.model), *arguments)


def make_plan(
  config: Config, topology: str, devices: list[jax.Device], step: str = "train", *, quick: bool = False
) -> tuple[Plan, Any]:
  """Compiles the step; returns the plan, and the executable (None where it does not fit).

  Args:
    quick: let XLA optimise little, which takes a third of the time or less. Communication comes out the same, memory
      up to a fifth smaller: enough to choose among meshes, not to say that one fits.

  Raises:
    ConfigError: the mesh does not suit the topology, the model or the batch.
  """
  config = for_tpu(config)
  if step != "train":
    rows = config.scored_at_once if step == "eval" else config.batch_size
    config = dataclasses.replace(config, batch_size=rows, accumulate=1)
  mesh = make_mesh(config.mesh, devices)
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
    memory: Any = executable.memory_analysis()
    plan.arguments, plan.temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    plan.output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    plan.total = plan.arguments + plan.output + plan.temporaries
    plan.fits = plan.total <= plan.memory
    plan.reason = "" if plan.fits else "the compiler used more than the device has"
    found = collectives(executable.as_text() or "")
    counts: Counter[str] = Counter()
    sent: dict[str, float] = defaultdict(float)
    for one in found:
      kind = one.kind + _BETWEEN * one.between_slices
      counts[kind] += one.times
      sent[kind] += one.wire_bytes
    plan.wire = {kind: (counts[kind], sent[kind]) for kind in counts}
  if step != "generate" and executable is not None:
    within, between = (sum(one.wire_bytes for one in found if one.between_slices == far) for far in (False, True))
    plan.bounds = roofline.bounds(config, devices[0], len(devices), mesh.shape["tensor"], step, within, between)
  return plan, executable


def _read_shortage(plan: Plan, text: str) -> None:
  """What the compiler says of a step that does not fit."""
  plan.reason = " ".join(text.split()).removeprefix("RESOURCE_EXHAUSTED: ").split(". ")[0][:200]
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  needed = re.search(r"(?:required[^(]*\(|Used )([\d.]+)([KMGT])", text)
  if needed:
    plan.total = int(float(needed[1]) * units[needed[2]])


def axes_text(mesh: Mapping[str, int]) -> str:
  """The axes of a mesh as --mesh takes them, `fsdp=16,seq=4`; those of one device are left out."""
  return ",".join(f"{name}={size}" for name, size in mesh.items() if size > 1) or "one device"


def describe(plan: Plan) -> str:
  """The plan for people."""
  config, model = plan.config, plan.config.model
  axes = axes_text(plan.mesh)
  forward = flops.flops_per_byte(model)
  per_byte = forward * (flops.TRAINING_FACTOR if plan.step == "train" else 1)
  size = [f"{config.batch_size} x {model.context:,} bytes", f"remat {model.remat}"]
  if config.accumulate > 1 and plan.step == "train":
    size.append(f"in {config.accumulate} parts")
  how = "compiled quickly" if plan.quick else "compiled"
  lines = [
    f"topology    {plan.topology}: {plan.chips} chips, {plan.devices} devices ({plan.kind}), mesh {axes}",
    f"model       {human(flops.parameter_count(model))} parameters, {human(per_byte, 'FLOP')} per byte of {plan.step}",
    f"step        {plan.step}, {', '.join(size)}; {how} in {duration(plan.seconds)}",
  ]
  of = f"of {plan.memory / _GIB:.1f} GiB a device"
  if plan.arguments:
    parts = [(plan.arguments, "arguments"), (plan.temporaries, "temporaries"), (plan.output, "output")]
    shown = " + ".join(f"{size / _GIB:.2f} {name}" for size, name in parts)
    lines.append(f"memory      {plan.total / _GIB:.2f} GiB {of} ({shown})")
  lines.append("fits        yes" if plan.fits else f"fits        no: {plan.reason}")
  for kind, (count, sent) in sorted(plan.wire.items()):
    lines.append(f"{kind:<26}{count:>6} a step, each device sends {human(sent, 'B')}")
  if plan.bounds:
    b = plan.bounds
    network = f", network {1e3 * b.network:.1f} ms" if b.network else ""
    if not b.network and any(_BETWEEN in kind for kind in plan.wire):
      network = ", network not counted (its rate is not known)"
    lines += [
      f"bounds      compute {1e3 * b.compute:.1f} ms, memory ~{1e3 * b.memory:.1f} ms, links {1e3 * b.links:.1f} ms"
      + network,
      f"at best     {1e3 * b.step:.1f} ms a step, MFU {100 * b.mfu:.0f}%, "
      f"{human(config.batch_size * flops.predicted_bytes(model) / b.step, 'B/s')}",
    ]
  if plan.days is not None:
    total = config.num_steps * config.batch_size * flops.predicted_bytes(model)
    lines.append(f"run         {config.num_steps:,} steps, {human(total, 'B')}: {plan.days:.2f} days at best")
  return "\n".join(lines)


def to_json(plan: Plan) -> str:
  """The plan as one JSON object on one line."""
  values = dataclasses.asdict(plan)
  values["config"] = plan.config.to_dict()
  values["parameters"] = flops.parameter_count(plan.config.model)
  values["days"] = plan.days
  if plan.bounds:
    values["bounds"] |= {"step": plan.bounds.step, "mfu": plan.bounds.mfu}
  return json.dumps(values)


def save(executable: jax.stages.Compiled, path: str | os.PathLike) -> None:
  """Writes the executable for devices of the same topology, where JAX and libtpu have the same versions.

  There `jax.experimental.serialize_executable.deserialize_and_load(*pickle.loads(pathlib.Path(path).read_bytes()))`
  makes it callable, without compiling. Unpickling runs code: load only files that you wrote.
  """
  from jax.experimental.serialize_executable import serialize  # noqa: PLC0415

  with replacing(path) as file:
    file.write_bytes(pickle.dumps(serialize(executable)))


def changed(
  config: Config, *, batch_size: int = 0, accumulate: int = 0, remat: Remat | Literal[""] = "", mesh: str = ""
) -> Config:
  """The config with what the flags change; a batch of another size keeps the bytes to train on."""
  if batch_size:
    steps = max(1, round(config.num_steps * config.batch_size / batch_size))
    config = dataclasses.replace(config, batch_size=batch_size, num_steps=steps, accumulate=1)
  if accumulate:
    config = dataclasses.replace(config, accumulate=accumulate)
  if remat:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
  return dataclasses.replace(config, mesh=parse_mesh(mesh)) if mesh else config


def main(arguments: list[str]) -> None:
  """Reads the flags, compiles, prints."""
  require(len(arguments) < 2, f"unexpected {' '.join(arguments[1:])}; flags begin with --")
  jax.config.update("jax_platforms", "cpu")  # nothing runs here, and a TPU of this machine may be busy
  values = flags.FLAGS
  if values.save:
    check_output_file("--save", values.save)
  config = changed(
    Config.from_dict(values.config),
    batch_size=values.batch_size,
    accumulate=values.accumulate,
    remat=values.remat,
    mesh=values.mesh,
  )
  devices = topology_devices(values.topology, values.slices)
  require(not (values.search and values.quick), "--search ends with the real program; leave out --quick")
  if values.search:
    from megabyte_jax.plan_search import search  # noqa: PLC0415

    sizes = (config.batch_size,) if values.batch_size else ()
    plan, executable = search(config, values.topology, devices, values.step, tries=values.tries, batch_sizes=sizes)
  else:
    plan, executable = make_plan(config, values.topology, devices, values.step, quick=values.quick)
  print(to_json(plan) if values.json else describe(plan), flush=True)
  if values.save:
    require(executable is not None, f"--save={values.save}: nothing was written, for the step does not fit")
    save(executable, values.save)


def define_flags() -> None:
  """The command's flags."""
  config_flags.DEFINE_config_file("config", None, "What to plan.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_string("topology", "v5p:4x4x4", "KIND:SIZE, in chips.")
  flags.DEFINE_integer("slices", 1, "Slices of that topology, joined by the data centre's network.")
  flags.DEFINE_string("mesh", "", "Devices per axis, like fsdp=16,seq=4; default the config's.")
  flags.DEFINE_integer("batch_size", 0, "Windows per step; 0 takes the config's.")
  flags.DEFINE_integer("accumulate", 0, "Parts a batch is worked through in; 0 takes the config's.")
  flags.DEFINE_enum("remat", "", ["", *get_args(Remat)], "Default: the config's.")
  flags.DEFINE_enum("step", "train", STEPS, "What to compile.")
  flags.DEFINE_boolean("quick", False, "Compile in a third of the time; memory may come out a fifth too small.")
  flags.DEFINE_boolean("search", False, "Try meshes, remat, parts and, without --batch_size, batches; recommend one.")
  flags.DEFINE_integer("tries", 8, "Combinations that --search compiles at most.")
  flags.DEFINE_boolean("json", False, "Print one JSON object.")
  flags.DEFINE_string("save", "", "Keep the serialized executable in this file.")


if __name__ == "__main__":
  define_flags()
  command_line.run_with_flags(main)
