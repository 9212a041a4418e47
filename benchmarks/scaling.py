"""What several devices of one host are worth: speed, memory, communication, and the same losses as on one.

  python benchmarks/scaling.py                                  all GPUs: 24 x 2048 + 15 x 1024 and Image640
  python benchmarks/scaling.py --devices=8 --cases=tiny         eight virtual devices of a CPU

Each mesh and its one-device reference run in processes of their own, one after the other.

- data, fsdp, tensor: weak scaling. N devices take N times the rows of one.
- seq: one sequence is spread over N devices, and one device takes it whole: strong scaling.

Columns: bytes/s; its share of N times the bytes/s of one device in the same run; seconds of a step beyond the ideal
ones, which is communication that nothing hides (and whatever else gets slower); most memory of one device; bytes that a
device sends in a step, from the compiled program; the largest difference of the first losses from those of one device
that works through the same rows in parts (relative). After the last of these steps the run is saved, and one device
goes on from there: the last column is how far its next loss is from that of the run that went on.

On a CPU the virtual devices share its cores, so speeds mean nothing there; losses, resuming and bytes sent do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from train_speed import cases, cells

CASES = ("text24", "image640", "tiny")
STEPS = 20  # whose losses are compared
COLUMNS = {  # and how their numbers are shown
  "bytes/s": "{:,.0f}",
  "of ideal": "{:.1%}",
  "s beyond": "{:.3f}",
  "GiB": "{:.1f}",
  "MB sent": "{:,.1f}",
  "loss differs": "{:.1e}",
  "resumed differs": "{:.1e}",
}


def config_of(case: str, mesh: dict[str, int], *, reference: bool):
  """The config of a case on a mesh, or of one device that takes the same rows in as many parts as there are devices."""
  from megabyte_jax.config import CheckpointConfig, Level, MegabyteConfig, MeshConfig  # noqa: PLC0415

  config = cases()["text24" if case == "tiny" else case]
  if case == "tiny":
    level: dict[str, Any] = {"num_layers": 2, "num_heads": 8}
    levels = (Level(patch_size=8, width=128, **level), Level(patch_size=1, width=64, **level))
    config = dataclasses.replace(
      config, model=MegabyteConfig(context=1024, levels=levels, dropout=0.0, init_std=0.02), batch_size=2
    )
  replicas = mesh.get("data", 1) * mesh.get("fsdp", 1)
  rows = config.batch_size * (replicas if mesh.get("seq", 1) == 1 else 1) * mesh.get("tensor", 1)
  return dataclasses.replace(
    config,
    mesh=MeshConfig(data=1) if reference else MeshConfig(**{"data": 1} | mesh),
    batch_size=rows,
    accumulate=rows // config.batch_size if reference else 1,
    checkpoint=CheckpointConfig(),
    num_steps=100_000,
  )


def measure(case: str, mesh: dict[str, int], reference: bool, seconds: float, workdir: str, resume: bool) -> dict:
  """One run: its first losses, its speed, what it sends. JAX is imported here, where the devices are chosen."""
  import jax  # noqa: PLC0415
  import numpy as np  # noqa: PLC0415

  from megabyte_jax import flops, hardware  # noqa: PLC0415
  from megabyte_jax.checkpoint import Checkpoints  # noqa: PLC0415
  from megabyte_jax.collectives import collectives  # noqa: PLC0415
  from megabyte_jax.config import DataConfig  # noqa: PLC0415
  from megabyte_jax.data.batches import batches  # noqa: PLC0415
  from megabyte_jax.data.sources import open_source  # noqa: PLC0415
  from megabyte_jax.sharding import batch_sharding, make_mesh  # noqa: PLC0415
  from megabyte_jax.train_state import TrainState, abstract_state, initial_state, make_train_step  # noqa: PLC0415

  config = config_of(case, mesh, reference=reference)
  made = make_mesh(config.mesh, jax.devices()[:1] if reference else None)
  source = open_source(DataConfig(), "train")
  step, losses = make_train_step(config), []
  with Checkpoints(workdir, config.checkpoint) as checkpoints, jax.set_mesh(made):
    if resume:
      abstract = abstract_state(config, made)
      restored = checkpoints.restore(abstract.parameters, abstract.opt_state)
      number = jax.device_put(np.int32(restored.step), abstract.step.sharding)
      state = TrainState(number, restored.params, restored.opt_state)
    else:
      state = initial_state(config, made)
    stream = batches(
      source,
      batch_size=config.batch_size,
      context=config.model.context,
      seed=0,
      first_step=STEPS if resume else 0,
      num_steps=STEPS + 1,
      sharding=batch_sharding(made),
    )
    for number, batch in stream:
      if number == STEPS and not (resume or reference):
        checkpoints.save(STEPS, state.parameters, state.opt_state, {}, force=True)
        checkpoints.wait()
      state, values = step(state, batch.x_BT, None)
      losses.append(float(values["nats"]) / float(values["bytes"]))
    result = {"losses": losses, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if resume:
      return result
    compiled = step.lower(state, batch.x_BT, None).compile()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
      state, values = step(state, batch.x_BT, None)
      jax.block_until_ready(values)
      count += 1
    taken = (time.perf_counter() - begin) / count
  sent = sum(c.wire_bytes for c in collectives(compiled.as_text() or ""))
  peak = hardware.memory_in_use(jax.devices())
  predicted = config.batch_size * flops.predicted_bytes(config.model)
  return result | {"seconds": taken, "bytes/s": predicted / taken, "sent": sent, "peak": peak}


def in_own_process(arguments: list[str], devices: int) -> dict:
  """What `measure` returns in a process that sees `devices` devices."""
  environment = dict(os.environ)
  if environment.get("JAX_PLATFORMS", "") == "cpu":
    others = [f for f in environment.get("XLA_FLAGS", "").split() if "device_count" not in f]
    environment["XLA_FLAGS"] = " ".join([*others, f"--xla_force_host_platform_device_count={devices}"])
  else:
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(devices)))
  command = [sys.executable, __file__, *arguments]
  done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
  if done.returncode:
    return {"error": next((x for x in done.stderr.splitlines()[::-1] if "rror" in x or "EXHAUSTED" in x), "failed")}
  return json.loads(done.stdout.splitlines()[-1])


def row(case: str, mesh: dict[str, int], devices: int, seconds: float) -> dict:
  """One mesh against one device."""
  with tempfile.TemporaryDirectory() as workdir:
    common = [f"--only={case}", f"--mesh={json.dumps(mesh)}", f"--seconds={seconds}", f"--workdir={workdir}"]
    many = in_own_process(common, devices)
    one = in_own_process([*common, "--reference", f"--workdir={workdir}/reference"], 1)
    resumed = in_own_process([*common, "--reference", "--resume"], 1) if "error" not in many else many
  found = {"case": case, "mesh": mesh, "devices": devices, "many": many, "one": one, "resumed": resumed}
  if any("error" in part for part in (many, one, resumed)):
    return found | {"error": "; ".join(part["error"] for part in (many, one, resumed) if "error" in part)}
  ideal = devices * one["bytes/s"]
  differ = max(abs(a - b) / b for a, b in zip(many["losses"], one["losses"], strict=True))
  return found | {
    "bytes/s": many["bytes/s"],
    "of ideal": many["bytes/s"] / ideal,
    "s beyond": many["seconds"] * (1 - many["bytes/s"] / ideal),
    "GiB": many["peak"] / 2**30 if many["peak"] else None,
    "MB sent": many["sent"] / 1e6,
    "loss differs": differ,
    "resumed differs": abs(resumed["losses"][0] - many["losses"][-1]) / many["losses"][-1],
  }


def show(found: dict) -> None:
  """One line of the table."""
  name = f"{found['case']} {','.join(f'{axis}={size}' for axis, size in found['mesh'].items())}"
  print(f"{name:<28} {found['error'][:200] if 'error' in found else cells(found, COLUMNS, 15)}", flush=True)


def count_gpus() -> int:
  """As the driver tells, so that this process takes none of their memory."""
  try:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
  except FileNotFoundError:
    return 0
  return len(listed.splitlines())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--devices", type=int, default=0, help="default: all GPUs; on a CPU (JAX_PLATFORMS=cpu) 8")
  parser.add_argument("--cases", default="", help=f"of {', '.join(CASES)}; default: text24,image640, on a CPU tiny")
  parser.add_argument("--axes", default="data,fsdp,seq,tensor")
  parser.add_argument("--seconds", type=float, default=8.0, help="of steps that are timed")
  parser.add_argument("--output", default="", help="the rows, as JSON")
  for hidden in ("only", "mesh", "workdir"):
    parser.add_argument(f"--{hidden}", default="", help=argparse.SUPPRESS)
  for hidden in ("reference", "resume"):
    parser.add_argument(f"--{hidden}", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.only:
    mesh = json.loads(args.mesh)
    print(json.dumps(measure(args.only, mesh, args.reference, args.seconds, args.workdir, args.resume)))
    return
  on_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu"
  devices = args.devices or (8 if on_cpu else count_gpus())
  if devices < 2:
    raise SystemExit(f"found {devices} GPUs; scaling needs several (JAX_PLATFORMS=cpu tries it on virtual devices)")
  rows = []
  print(" " * 28, *(f"{column:>15}" for column in COLUMNS))
  for case in (args.cases or ("tiny" if on_cpu else "text24,image640")).split(","):
    for axis in args.axes.split(","):
      if case != "image640" or axis in ("seq", "fsdp"):
        rows.append(row(case, {axis: devices}, devices, args.seconds))
        show(rows[-1])
  print(f"{time.strftime('%Y-%m-%d')}, python {' '.join(sys.argv)}")
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  main()
