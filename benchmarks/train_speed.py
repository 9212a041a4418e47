"""Measures how fast models train: bytes a second, and the share of what the device can do.

  python benchmarks/train_speed.py                                    one GPU, every case, and the peers
  python benchmarks/train_speed.py --cases=text24,text24:dropout=0.1  some, with other options
  python benchmarks/train_speed.py --cases=text24 --kernels=10        and the ten largest kernels of its device trace
  python benchmarks/train_speed.py --cases=tiny --limit_seconds=0.2   a smoke test on a CPU

  python benchmarks/train_speed.py --cases=tiers                      small models by the modern recipe (tiers.py)

A case is a name of `cases` or of tiers.py, then options of the config, the model or the optimizer after colons
(`text24:remat=full:batch_size=32`, `1e18_megabyte8:name=adamw`).
Each runs in a process of its own, which after it measures the ceiling (8192^3 bfloat16 matrix products, sustained) and
the bandwidth of copies, so that every share is of the same clocks. Steps are those of train.py, AdamW included, on
random bytes.

Columns: bytes/s; the model's own FLOP/s (causal count, no recomputation); their share of the ceiling; the share of the
roofline (matrix products at the ceiling and then all other memory traffic at the copy bandwidth, not overlapped:
device_limits.least_seconds); peak memory; seconds to compile; the loss in bits per byte after the last step: a model
whose activations are not finite runs faster, and does not count. Small models have two more: the share of the roofline
whose products run at the rates measured at their own sizes (tiers.py), and the share of a step that Muon takes, by how
much a step of AdamW, timed after it in the same process, is shorter.

Where they are installed, other packages' models of the same widths, depths and heads are timed beside text24 and text14
(peers.py): MEGABYTE-pytorch as shipped, compiled, and compiled with the fused attention kernels it bars; mblm compiled
with these. Their FLOPs are torch's own count of their products; their batch is half of ours, as they need more memory.

--ahead=4 compiles four cases at a time before any is timed, which takes less of a rented GPU's time; seconds to compile
are those beside the others, then. The last lines are JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import math
import os
import sys
import tempfile
import time

import own_process
import peers
import tiers

from megabyte_jax.commands.arguments import Parser

PEERS = {  # how each is timed
  "MEGABYTE-pytorch shipped": "MEGABYTE-pytorch",
  "MEGABYTE-pytorch compiled": "MEGABYTE-pytorch",
  "MEGABYTE-pytorch fused attention": "MEGABYTE-pytorch",
  "mblm fused attention": "mblm",
}
PEER_CASES = ("text24", "text14")
DEFAULT_CASES = (
  "text24,text24:dropout=0.1,text14,text14_cross_patch,text_transformer,text_perceiver_ar,"
  "image256,image256_cross_patch,image640"
)
COLUMNS = {  # and how their numbers are shown
  "bytes/s": "{:,.0f}",
  "TFLOP/s": "{:.1f}",
  "of ceiling": "{:.1%}",
  "of roofline": "{:.1%}",
  "GiB": "{:.1f}",
  "compile s": "{:.0f}",
  "bits/byte": "{:.3f}",
  "by width": "{:.1%}",
  "Muon": "{:.1%}",
}


def cases() -> dict:
  """Returns configs by name: the sizes of the speed targets, and those of Tables 2 and 5 (appendix A.2)."""
  from megabyte_jax.config import Config  # noqa: PLC0415
  from megabyte_jax.paper import rows  # noqa: PLC0415

  def case(model, batch_size: int, **options) -> Config:
    options = {"dropout": 0.0, "remat": "named"} | options
    return Config(model=dataclasses.replace(model, **options), batch_size=batch_size, num_steps=1_000_000)

  def megabyte(global_shape, local_shape, patch_size, context, *, cross_patch=False):
    return rows.megabyte(global_shape, local_shape, patch_size=patch_size, context=context, cross_patch=cross_patch)

  return {
    "text24": case(megabyte((2048, 24), (1024, 15), 8, 8192), 16),
    "text14": case(megabyte((2048, 14), (1024, 18), 8, 8192), 16),
    "text14_cross_patch": case(megabyte((2048, 14), (1024, 18), 8, 8192, cross_patch=True), 16),
    "text_transformer": case(rows.transformer((1024, 22), 1024), 64),
    "text_perceiver_ar": case(rows.perceiver_ar((1024, 17), 8192, 1024), 16),
    "image256": case(megabyte((768, 12), (768, 12), 192, 196_608), 4, patch_groups=8),
    "image256_cross_patch": case(megabyte((768, 12), (768, 12), 192, 196_608, cross_patch=True), 1),
    "image640": case(megabyte((768, 12), (768, 8), 192, 1_228_800), 1, patch_groups=16),
    "tiny": case(megabyte((768, 1), (768, 1), 8, 128), 1),
  }


def config_of(case: str):
  """Returns the config of NAME:key=value:..., its options read as train.py reads its flags."""
  from megabyte_jax.config import Config  # noqa: PLC0415

  name, *options = case.split(":")
  plain = (tiers.tier_config(name) if name in tiers.KNOWN else cases()[name]).to_config_dict()
  for option in options:
    key, _, value = option.partition("=")
    place = next(part for part in (plain, plain["model"], plain["optimizer"]) if key in part)
    place[key] = type(place[key])(json.loads(value) if not isinstance(place[key], str) else value)
  return Config.from_dict(plain)


def measure(case: str, seconds: float, limit_seconds: float, kernels: int) -> dict:
  """Times one of our models; JAX is imported here so that the parent process takes no device memory."""
  import jax  # noqa: PLC0415
  from device_limits import copy_bandwidth, least_seconds, matmul_flops  # noqa: PLC0415
  from kernels import kernel_times, summary  # noqa: PLC0415

  from megabyte_jax.models import flops  # noqa: PLC0415
  from megabyte_jax.parallel import hardware  # noqa: PLC0415
  from megabyte_jax.planning.step_time import TimedStep  # noqa: PLC0415

  config = config_of(case)

  def timed(step: TimedStep) -> tuple[float, float]:
    """Seconds of a step, alone and among many."""
    one = min(step.seconds(1) for _ in range(2))
    step.seconds(max(1, round(seconds / 2 / one)))  # the clocks settle
    steps = max(1, round(seconds / one))
    return one, step.seconds(steps) / steps

  begin = time.perf_counter()
  step = TimedStep(config)
  first = time.perf_counter() - begin
  one, taken = timed(step)
  peak = hardware.memory_in_use(jax.devices())
  bits = step.nats / step.bytes / math.log(2)
  per_step, step_bytes = flops.flops_per_byte(config.model, training=True) * step.bytes, step.bytes
  largest = ""
  if kernels:
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        step.seconds(2)
      largest = summary(kernel_times(folder, times=2), kernels)
  del step
  is_small, muon = case.partition(":")[0] in tiers.KNOWN, None
  if is_small and config.optimizer.name == "muon":
    adamw = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="adamw"))
    muon = 1 - timed(TimedStep(adamw))[1] / taken
  on_cpu = jax.default_backend() == "cpu"
  ceiling = matmul_flops(limit_seconds, 512 if on_cpu else 8192)
  bandwidth = copy_bandwidth(1 << 24 if on_cpu else 1 << 30)
  return {
    "case": case,
    "device": jax.devices()[0].device_kind,
    "versions": f"jax {jax.__version__}",
    "ceiling_flops": ceiling,
    "copy_bandwidth": bandwidth,
    "step_seconds": taken,
    "bytes/s": step_bytes / taken,
    "TFLOP/s": per_step / taken / 1e12,
    "of ceiling": per_step / taken / ceiling,
    "of roofline": least_seconds(config, ceiling, bandwidth) / taken,
    "GiB": peak / 2**30 if peak else None,
    "compile s": first - one,
    "bits/byte": bits,
    "by width": tiers.least_seconds_by_width(config, ceiling, bandwidth) / taken if is_small else None,
    "Muon": muon,
    "kernels": largest,
  }


def compile_only(case: str) -> dict:
  """Compiles the training step of one of our models for the cache on disk."""
  from megabyte_jax.parallel.sharding import make_mesh  # noqa: PLC0415
  from megabyte_jax.planning.lowering import lower  # noqa: PLC0415

  config = config_of(case)
  begin = time.perf_counter()
  lower(config, make_mesh(config.mesh), "train").compile()
  return {"case": case, "compile s": time.perf_counter() - begin}


def measure_peer(how: str, case: str, seconds: float, limit_seconds: float) -> dict:
  """Times the peer of PEERS at the case's widths and depths and half its batch, under autocast to bfloat16."""
  import torch  # noqa: PLC0415
  from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

  config = config_of(case)
  torch.manual_seed(0)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  is_mblm = PEERS[how] == "mblm"
  made = peers.mblm(config.model) if is_mblm else peers.megabyte_pytorch(config.model)
  if how.endswith("fused attention"):
    peers.open_attention(made)
  made = made.to(device)
  optimizer = torch.optim.AdamW(made.parameters(), lr=2e-4, betas=(0.9, 0.98), weight_decay=0.1, fused=device == "cuda")
  x_BT = torch.randint(0, 256, (max(1, config.batch_size // 2), config.model.context), device=device)
  run = made if how.endswith("shipped") else torch.compile(made)
  options = {} if is_mblm else {"return_loss": True}  # mblm gives the loss unless it is asked for more

  def train_step():
    with torch.autocast(device, torch.bfloat16):
      loss = run(x_BT, **options)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  def timed(steps: int) -> tuple[float, float]:
    begin = time.perf_counter()
    for _ in range(steps):
      loss = train_step()
    value = float(loss)  # waits
    return (time.perf_counter() - begin) / steps, value

  first = timed(1)[0]
  one = min(timed(1)[0] for _ in range(2))
  timed(max(1, round(seconds / 2 / one)))
  taken, loss = timed(max(1, round(seconds / one)))
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
  run = made
  with FlopCounterMode(display=False) as counter:
    train_step()
  a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) if limit_seconds > 1 else None
  ceiling = None
  if a is not None:
    for _ in range(2):
      torch.cuda.synchronize()
      begin, count = time.perf_counter(), 0
      while time.perf_counter() - begin < limit_seconds / 2:
        for _ in range(10):
          a @ a
        torch.cuda.synchronize()
        count += 10
      ceiling = count * 2 * 8192**3 / (time.perf_counter() - begin)
  rate = counter.get_total_flops() / taken
  return {
    "case": f"{case} {how}",
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "versions": f"torch {torch.__version__}",
    "ceiling_flops": ceiling,
    "step_seconds": taken,
    "bytes/s": x_BT.numel() / taken,
    "TFLOP/s": rate / 1e12,
    "of ceiling": rate / ceiling if ceiling else None,
    "of roofline": None,
    "GiB": peak / 2**30 if peak else None,
    "compile s": first - one,
    "bits/byte": loss / math.log(2),
  }


def show(row: dict) -> None:
  """Prints one line of the table."""
  print(f"{row['case']:<44} {row['error'] if 'error' in row else cells(row, COLUMNS, 11)}", flush=True)
  if row.get("kernels"):
    print(row["kernels"], flush=True)


def cells(row: dict, columns: dict[str, str], width: int) -> str:
  """Formats the numbers of a row by the columns' formats, right-aligned; - where one was not measured."""
  values = (form.format(row[name]) if row.get(name) is not None else "-" for name, form in columns.items())
  return " ".join(f"{value:>{width}}" for value in values)


def in_own_process(arguments: list[str], name: str, patience: float, *, preallocate: bool = True) -> dict:
  """Returns the row that this file prints in another process, or why there is none."""
  environment = {
    **os.environ,
    "XLA_PYTHON_CLIENT_PREALLOCATE": str(preallocate).lower(),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95"),
  }
  return {"case": name} | own_process.last_line(__file__, arguments, environment, patience)


def ahead(wanted: list[tuple[str, str]], at_once: int, patience: float) -> dict[tuple[str, str], float]:
  """Compiles all cases for the caches on disk, `at_once` of ours beside two peers, which run; returns their seconds."""

  def once(which: tuple[str, str]) -> float | None:
    case, how = which
    kind = ["--seconds=0.1", "--limit_seconds=0"] if how else ["--compile_only"]
    row = in_own_process([f"--only={case}", f"--peer={how}", *kind], f"{case} {how}", patience, preallocate=False)
    return row.get("compile s")

  wanted = [(case, how) for case, how in wanted if not how.endswith("shipped")]  # that is not compiled
  with concurrent.futures.ThreadPoolExecutor(at_once) as ours, concurrent.futures.ThreadPoolExecutor(2) as peers_:
    done = {which: (peers_ if which[1] else ours).submit(once, which) for which in wanted}
  return {which: seconds for which, future in done.items() if (seconds := future.result()) is not None}


def main() -> None:
  """Runs the cases and their peers one after the other."""
  parser = Parser("python benchmarks/train_speed.py", description=__doc__)
  parser.add_argument("--cases", default=DEFAULT_CASES)
  parser.add_argument("--peers", help=f"cases whose peers are timed, if installed; default: {PEER_CASES}, if asked for")
  parser.add_argument("--seconds", type=float, default=8.0, help="of training steps that are timed, after half as many")
  parser.add_argument("--limit-seconds", type=float, default=4.0, help="of matrix products that set the ceiling")
  parser.add_argument(
    "--patience", type=float, default=300.0, help="seconds that one case may take, compiling included"
  )
  parser.add_argument("--ahead", type=int, default=0, help="cases compiled at a time, before any is timed; 0: none")
  parser.add_argument("--kernels", type=int, default=0, help="so many of the largest kernels of our cases are shown")
  parser.add_argument("--output", default="", help="JSON lines are added to this file, too")
  parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--only", default="", help=argparse.SUPPRESS)
  parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.only:
    numbers = (args.only, args.seconds, args.limit_seconds)
    if args.compile_only:
      row = compile_only(args.only)
    else:
      row = measure_peer(args.peer, *numbers) if args.peer else measure(*numbers, args.kernels)
    print(json.dumps(row))
    return
  given = [name for case in args.cases.split(",") for name in (tiers.CASES if case == "tiers" else [case])]
  wanted = [(case, "") for case in given if case]
  beside = [case for case, _ in wanted if case in PEER_CASES] if args.peers is None else args.peers.split(",")
  installed = {package: peers.installed(package) for package in peers.PACKAGES}
  wanted += [(case, how) for case in beside if case for how, package in PEERS.items() if installed[package]]
  run = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
  print(run["date"], run["command"])
  print(" " * 44, *(f"{column:>11}" for column in COLUMNS))
  rows, compiled = [], {}
  options = [f"--seconds={args.seconds}", f"--limit_seconds={args.limit_seconds}", f"--kernels={args.kernels}"]
  with tempfile.TemporaryDirectory() as cache:
    if args.ahead:
      os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
      compiled = ahead(wanted, args.ahead, args.patience)
    for case, how in wanted:
      row = in_own_process([f"--only={case}", f"--peer={how}", *options], f"{case} {how}".strip(), args.patience) | run
      if (case, how) in compiled:
        row["compile s"] = compiled[case, how]
      rows.append(row)
      show(row)
      if args.output:  # at once: a run that is cut off leaves what it measured
        with open(args.output, "a") as file:
          file.write(json.dumps(row) + "\n")
  for package in [package for package, there in installed.items() if beside and not there]:
    print(f"{package} is not installed")
  print("\n".join(json.dumps(row) for row in rows))


if __name__ == "__main__":
  main()
