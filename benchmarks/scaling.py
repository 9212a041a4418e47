"""Compares several devices of one host with one: speed, memory, communication, and whether the losses are the same.

  python benchmarks/scaling.py                                  all GPUs: 24 x 2048 + 15 x 1024 and Image640
  python benchmarks/scaling.py --devices=8 --cases=tiny         eight virtual devices of a CPU

Each mesh and each one-device reference run in processes of their own: the meshes one after the other, then the
references, a device each. With --ahead=N all programs are compiled before, N at a time.

- data, fsdp, tensor: weak scaling. N devices take N times the rows of one.
- seq: one sequence is spread over N devices, and one device takes it whole: strong scaling.

Columns: bytes/s; its share of N times the bytes/s of one device in the same run; seconds of a step beyond the ideal
ones, which is communication that nothing hides (and whatever else gets slower); most memory of one device; bytes that a
device sends in a step, from the compiled program; the seconds that these take at the rate at which the same devices
just summed large arrays, which is the limit where nothing can be hidden (`tensor`); the largest difference of the first
losses from those of one device that works through the same rows in parts (relative; its speed is taken without parts).
After the last of these steps the run is saved, and one device goes on from there: the last column is how far its next
loss is from that of the run that went on.

--flags=FLAGS, which may be given several times, measures every mesh once more with these added to XLA_FLAGS, without
saving and resuming, and compares it with one device without them.

On a CPU the virtual devices share its cores, so speeds mean nothing there; losses, resuming and bytes sent do.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from typing import Any

import own_process
from train_speed import cases, cells

from megabyte_jax.commands.arguments import Parser
from megabyte_jax.files.atomic_file import replacing

CASES = ("text24", "image640", "tiny")
STEPS = 20  # whose losses are compared
COLUMNS = {  # and how their numbers are shown
  "bytes/s": "{:,.0f}",
  "of ideal": "{:.1%}",
  "s beyond": "{:.3f}",
  "GiB": "{:.1f}",
  "MB sent": "{:,.1f}",
  "s on wire": "{:.3f}",
  "loss differs": "{:.1e}",
  "resumed differs": "{:.1e}",
}


def config_of(case: str, mesh: dict[str, int], *, reference: bool, batch_size: int = 0):
  """Returns the config of a case on a mesh, or of one device that takes the same rows in as many parts."""
  from megabyte_jax.config import CheckpointConfig, Level, MegabyteConfig, MeshConfig  # noqa: PLC0415

  config = cases()["text24" if case == "tiny" else case]
  config = dataclasses.replace(config, batch_size=batch_size or config.batch_size)
  if case == "tiny":
    level: dict[str, Any] = {"num_layers": 2, "num_heads": 8}
    levels = (Level(patch_size=8, width=128, **level), Level(patch_size=1, width=64, **level))
    config = dataclasses.replace(
      config, model=MegabyteConfig(context=1024, levels=levels, dropout=0.0, init_std=0.02), batch_size=batch_size or 2
    )
  replicas = mesh.get("data", 1) * mesh.get("fsdp", 1)
  if not reference:  # groups of patches that are as large on each device as on one
    groups = max(1, config.model.patch_groups // mesh.get("seq", 1))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, patch_groups=groups))
  rows = config.batch_size * (replicas if mesh.get("seq", 1) == 1 else 1) * mesh.get("tensor", 1)
  return dataclasses.replace(
    config,
    mesh=MeshConfig(data=1) if reference else MeshConfig(**{"data": 1} | mesh),
    batch_size=rows,
    accumulate=rows // config.batch_size if reference else 1,
    checkpoint=CheckpointConfig(),
    num_steps=100_000,
  )


def measure(args: argparse.Namespace) -> dict:
  """Measures one run: its first losses, speed, bytes sent; a reference also goes on from the meshes' checkpoints.

  JAX is imported here, where the devices are chosen.
  """
  import jax  # noqa: PLC0415

  from megabyte_jax.checkpoints.checkpoints import Checkpoints  # noqa: PLC0415
  from megabyte_jax.parallel import hardware  # noqa: PLC0415
  from megabyte_jax.parallel.sharding import make_mesh  # noqa: PLC0415
  from megabyte_jax.planning.collectives import collectives  # noqa: PLC0415
  from megabyte_jax.planning.lowering import lower  # noqa: PLC0415
  from megabyte_jax.training.state import initial_state  # noqa: PLC0415

  config = config_of(args.only, json.loads(args.mesh), reference=args.reference, batch_size=args.batch_size)
  made = make_mesh(config.mesh, jax.devices()[:1] if args.reference else None)
  step = lower(config, made, "train").compile()
  if args.compile_only:
    return {}
  losses: list[float] = []
  result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "losses": losses}
  with jax.set_mesh(made):
    state = initial_state(config, made)
    for number, batch in stream(config, made, 0):
      if number == STEPS and args.workdir:
        with Checkpoints(args.workdir, config.checkpoint) as checkpoints:
          checkpoints.save(STEPS, state.parameters, state.opt_state, {})
      state, values = step(state, batch.x_BT, None, None)
      losses.append(float(values["nats"]) / float(values["bytes"]))
    timed, x_BT = config, batch.x_BT
    if args.reference and config.accumulate > 1:  # the speed that counts is without parts
      rows = config.batch_size // config.accumulate
      timed, x_BT = dataclasses.replace(config, batch_size=rows, accumulate=1), batch.x_BT[:rows]
    timed_step = step if timed is config else lower(timed, made, "train").compile()
    state, values = timed_step(state, x_BT, None, None)
    jax.block_until_ready(values)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < args.seconds:
      state, values = timed_step(state, x_BT, None, None)
      jax.block_until_ready(values)
      count += 1
    taken = (time.perf_counter() - begin) / count
    result["peak"] = hardware.memory_in_use(jax.devices())
    del state
    result["resumed"] = [resumed_loss(config, made, step, workdir) for workdir in args.resume.split(",") if workdir]
  predicted = timed.bytes_per_step
  sent = sum(c.wire_bytes for c in collectives(step.as_text() or ""))
  result |= {"seconds": taken, "bytes/s": predicted / taken, "sent": sent}
  return result if args.reference else result | {"wire": wire_rate(made)}


def wire_rate(mesh, megabytes: int = 128, sums: int = 20) -> float:
  """Measures the bytes/s that a device sends while all devices of a mesh sum bfloat16 arrays that each of them has."""
  import jax  # noqa: PLC0415
  import jax.numpy as jnp  # noqa: PLC0415

  axes, everywhere = mesh.axis_names, jax.sharding.PartitionSpec()

  def summed(x):
    return jax.lax.fori_loop(0, sums, lambda _, x: jax.lax.psum(x, axes), x)  # each waits for the one before

  program = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False))
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16  # sums of bfloat16 end the process on CPUs
  x = jnp.zeros(megabytes * 2**20 // dtype.dtype.itemsize, dtype)  # whose sums need no division
  x = jax.device_put(x, jax.sharding.NamedSharding(mesh, everywhere))
  jax.block_until_ready(program(x))
  taken = []
  for _ in range(3):
    begin = time.perf_counter()
    jax.block_until_ready(program(x))
    taken.append(time.perf_counter() - begin)
  return sums * x.nbytes * 2 * (mesh.size - 1) / mesh.size / min(taken)  # a ring sends each part twice


def stream(config, mesh, first_step: int):
  """Yields batches of the project's own text, from step `first_step` to step `STEPS`."""
  from megabyte_jax.config import DataConfig  # noqa: PLC0415
  from megabyte_jax.data.batches import batches  # noqa: PLC0415
  from megabyte_jax.data.open_data import open_source  # noqa: PLC0415
  from megabyte_jax.parallel.sharding import batch_sharding  # noqa: PLC0415

  return batches(
    open_source(DataConfig(), "train"),
    batch_size=config.batch_size,
    context=config.model.context,
    seed=0,
    first_step=first_step,
    num_steps=STEPS + 1,
    sharding=batch_sharding(mesh),
  )


def resumed_loss(config, mesh, step, workdir: str) -> float:
  """Returns the loss of step `STEPS` from the checkpoint in `workdir`."""
  from megabyte_jax.checkpoints.checkpoints import Checkpoints  # noqa: PLC0415
  from megabyte_jax.training.resume import restored_state  # noqa: PLC0415

  with Checkpoints(workdir, config.checkpoint) as checkpoints:
    state = restored_state(config, mesh, checkpoints)
  [(_, batch)] = stream(config, mesh, int(state.step))
  _, values = step(state, batch.x_BT, None, None)
  return float(values["nats"]) / float(values["bytes"])


def in_own_process(arguments: list[str], devices: list[int], flags: str = "") -> dict:
  """Returns what `measure` returns in a process that sees these devices, with flags added to XLA's."""
  environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": str("--compile_only" not in arguments).lower()}
  environment["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *flags.split()])
  if environment.get("JAX_PLATFORMS", "") == "cpu":
    others = [f for f in environment["XLA_FLAGS"].split() if "device_count" not in f]
    environment["XLA_FLAGS"] = " ".join([*others, f"--xla_force_host_platform_device_count={len(devices)}"])
  else:
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
  begin = time.perf_counter()
  found = own_process.last_line(__file__, arguments, environment)
  print(f"{time.perf_counter() - begin:6.0f} s  {' '.join(arguments)} {flags}", file=sys.stderr, flush=True)
  return found


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of the table: a case on a mesh, with flags added to XLA's."""

  case: str
  mesh: dict[str, int]
  flags: str = ""

  @property
  def reference(self) -> tuple[str, int]:
    """Returns what rows share that are compared with the same run of one device: the case and the rows of a step."""
    return self.case, config_of(self.case, self.mesh, reference=True).batch_size


def run(rows: list[Row], devices: int, args: argparse.Namespace) -> list[dict]:
  """Measures the rows of cases on meshes."""
  on_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu"
  every = list(range(devices))
  common = [f"--seconds={args.seconds}", f"--batch_size={args.batch_size}"]
  many = [[f"--only={row.case}", f"--mesh={json.dumps(row.mesh)}", *common] for row in rows]
  groups = {row.reference: [i for i, other in enumerate(rows) if other.reference == row.reference] for row in rows}
  with tempfile.TemporaryDirectory() as folder:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
    workdirs = ["" if row.flags or args.no_resume else f"{folder}/{i}" for i, row in enumerate(rows)]
    references = {key: [*many[own[0]], "--reference"] for key, own in groups.items()}
    if args.ahead:
      with concurrent.futures.ThreadPoolExecutor(args.ahead) as pool:
        jobs = [(each, every, row.flags) for each, row in zip(many, rows, strict=True)]
        jobs += [(each, every[:1], "") for each in references.values()]
        list(pool.map(lambda job: in_own_process([*job[0], "--compile_only"], *job[1:]), jobs))
    made = [
      in_own_process([*each, f"--workdir={workdir}"], every, row.flags)
      for each, workdir, row in zip(many, workdirs, rows, strict=True)
    ]
    free: queue.Queue[int] = queue.Queue()
    for device in every[:1] if on_cpu else every:
      free.put(device)

    saved = {key: [i for i in own if workdirs[i] and "error" not in made[i]] for key, own in groups.items()}

    def one_device(key):
      device = free.get()
      try:
        resume = f"--resume={','.join(workdirs[i] for i in saved[key])}"
        return key, in_own_process([*references[key], resume], [device])
      finally:
        free.put(device)

    with concurrent.futures.ThreadPoolExecutor(devices) as pool:
      ones = dict(pool.map(one_device, groups))
  found = []
  for i, row in enumerate(rows):
    one, resumed = ones[row.reference], saved[row.reference]
    loss = one["resumed"][resumed.index(i)] if "error" not in one and i in resumed else None
    found.append(dataclasses.asdict(row) | {"devices": devices} | compared(made[i], one, loss, devices))
  return found


def compared(many: dict, one: dict, resumed_loss: float | None, devices: int) -> dict:
  """Computes the columns of a mesh from its run, that of one device, and the loss of one device that took over."""
  found = {"many": many, "one": one}
  if "error" in many or "error" in one:
    return found | {"error": "; ".join(part["error"] for part in (many, one) if "error" in part)}
  ideal = devices * one["bytes/s"]
  last = many["losses"][-1]
  return found | {
    "bytes/s": many["bytes/s"],
    "of ideal": many["bytes/s"] / ideal,
    "s beyond": many["seconds"] * (1 - many["bytes/s"] / ideal),
    "GiB": many["peak"] / 2**30 if many["peak"] else None,
    "MB sent": many["sent"] / 1e6,
    "s on wire": many["sent"] / many["wire"],
    "loss differs": max(abs(a / b - 1) for a, b in zip(many["losses"], one["losses"], strict=True)),
    "resumed differs": None if resumed_loss is None else abs(resumed_loss - last) / last,
  }


def show(found: dict) -> None:
  """Prints one line of the table."""
  name = f"{found['case']} {','.join(f'{axis}={size}' for axis, size in found['mesh'].items())}"
  name += f" {found['flags']}" if found["flags"] else ""
  print(f"{name:<28} {found['error'][:200] if 'error' in found else cells(found, COLUMNS, 15)}", flush=True)


def count_gpus() -> int:
  """Counts the GPUs as the driver tells them, so that this process takes none of their memory."""
  try:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
  except FileNotFoundError:
    return 0
  return len(listed.splitlines())


def main() -> None:
  parser = Parser("python benchmarks/scaling.py", description=__doc__)
  parser.add_argument("--devices", type=int, default=0, help="default: all GPUs; on a CPU (JAX_PLATFORMS=cpu) 8")
  parser.add_argument("--cases", default="", help=f"of {', '.join(CASES)}; default: text24,image640, on a CPU tiny")
  parser.add_argument("--axes", default="data,fsdp,seq,tensor")
  parser.add_argument("--seconds", type=float, default=8.0, help="of steps that are timed")
  parser.add_argument("--batch-size", type=int, default=0, help="rows of one device; default: as train_speed.py has it")
  parser.add_argument("--flags", action="append", default=[], help="further flags of XLA; may be given several times")
  parser.add_argument("--output", default="", help="the rows, as JSON")
  parser.add_argument("--ahead", type=int, default=0, help="programs compiled at a time before any runs; 0: none")
  parser.add_argument(
    "--no-resume", action="store_true", help="without saving and resuming, which takes a minute a row"
  )
  for hidden in ("only", "mesh", "workdir", "resume"):
    parser.add_argument(f"--{hidden}", default="", help=argparse.SUPPRESS)
  for hidden in ("reference", "compile-only"):
    parser.add_argument(f"--{hidden}", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.only:
    print(json.dumps(measure(args)))
    return
  on_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu"
  devices = args.devices or (8 if on_cpu else count_gpus())
  if devices < 2:
    raise SystemExit(f"found {devices} GPUs; scaling needs several (JAX_PLATFORMS=cpu tries it on virtual devices)")
  cases_ = (args.cases or ("tiny" if on_cpu else "text24,image640")).split(",")
  axes = args.axes.split(",")  # one sequence of Image640 has nothing to give to data; fsdp and tensor save it little
  meshes = [(case, {axis: devices}) for case in cases_ for axis in axes if case != "image640" or axis == "seq"]
  rows = run([Row(case, mesh, flags) for flags in ("", *args.flags) for case, mesh in meshes], devices, args)
  print(" " * 28, *(f"{column:>15}" for column in COLUMNS))
  for found in rows:
    show(found)
  print(f"{time.strftime('%Y-%m-%d')}, python {' '.join(sys.argv)}")
  if args.output:
    with replacing(args.output) as path:
      path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  main()
