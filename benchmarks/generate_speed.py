"""How fast bytes are generated: MEGABYTE against a byte-level Transformer, each against the memory it must read.

  python benchmarks/generate_speed.py                         one GPU or TPU, full size
  python benchmarks/generate_speed.py --size=tiny             a smoke test on a CPU

Full size: MEGABYTE of 24 x 2048 and 15 x 1024 (P = 8, 8,192 bytes, 1.4B parameters) and a Transformer of 24 x 1024
(context 1,024, which moves by half when it is full), --bytes from an empty prompt. The first call compiles and is not
counted. Where torch and MEGABYTE-pytorch (0.3.6 was looked at) are installed, that package's MEGABYTE of the same
widths, depths and context is timed too: it has no cache, so each of its bytes costs a forward pass over all before it,
and a few bytes (--peer-bytes) at the end of its context are enough.

Columns: bytes/s of all samples together; against the Transformer of the same batch; the floor is the time in which the
parameters and the filled part of the caches can be read once for every step that uses them, in the dtype of the
computation, at the bandwidth of a copy that is measured in the same run. What fits into a cache of the chip, as all of
the tiny size does, can be faster than that. Last come lines of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # what is left is told at its true size

import jax
from device_limits import copy_bandwidth
from flax import nnx

from megabyte_jax import Level, MegabyteConfig, generate, windows
from megabyte_jax.models.build import initial_parameters, make_model
from megabyte_jax.models.layers import compute_dtype


@dataclasses.dataclass(frozen=True)
class Size:
  """What is compared: the two models, and how much."""

  megabyte: MegabyteConfig
  transformer: MegabyteConfig
  bytes: int
  batches: tuple[int, ...]
  copy_bytes: int


def model(context: int, *shapes: tuple[int, int, int, int]) -> MegabyteConfig:
  levels = tuple(Level(patch_size=p, width=width, num_layers=n, num_heads=h) for p, width, n, h in shapes)
  return MegabyteConfig(context=context, levels=levels, dropout=0.0)


SIZES = {
  "full": Size(
    model(8192, (8, 2048, 24, 32), (1, 1024, 15, 16)), model(1024, (1, 1024, 24, 16)), 8192, (1, 8, 64, 256), 1 << 30
  ),
  "tiny": Size(model(256, (8, 64, 2, 2), (1, 32, 2, 2)), model(64, (1, 64, 2, 2)), 256, (1, 8), 1 << 24),
}


def bytes_read(config: MegabyteConfig, batch: int, generated: int) -> int:
  """Parameters and filled cache entries that the steps for `generated` bytes of each sample use, from no prompt."""
  width = compute_dtype(config).itemsize
  shapes = jax.eval_shape(lambda: initial_parameters(config, jax.random.key(0)))
  total = 0
  for i, (level, span) in enumerate(zip(config.levels, config.spans, strict=True)):
    last = i == len(config.levels) - 1
    names = ["decoder"] + ["from_parent"] * (i > 0)
    used = jax.tree.leaves([shapes["levels"][i][name] for name in names])
    parameters = sum(leaf.size for leaf in used) + last * config.vocab_size * level.byte_width  # the output's table
    entry = 2 * level.num_layers * level.heads[0] * level.heads[1]  # keys and values of a slot
    for position in range(0, generated, level.patch_size):
      slots = (position - windows.window_start(position, config)) % span // level.patch_size
      total += width * (parameters + batch * slots * entry)
  return total


def seconds_to_generate(config: MegabyteConfig, made, batch: int, generated: int) -> float:
  """Of the better of two calls, after one that compiles."""

  def once() -> float:
    start = time.perf_counter()
    generate(made, b"", generated, num_samples=batch)
    return time.perf_counter() - start

  once()
  return min(once(), once())


def measure(size: Size, generated: int, batches: list[int]) -> list[dict]:
  """One row for each model and batch; a batch that memory cannot hold has no speed."""
  bandwidth = copy_bandwidth(size.copy_bytes)
  print(f"{jax.devices()[0].device_kind}, copy bandwidth {bandwidth / 1e9:,.0f} GB/s, {generated:,} bytes a sample")
  rows = []
  for name, config in (("Transformer", size.transformer), ("MEGABYTE", size.megabyte)):
    made = make_model(config, nnx.Rngs(0))
    for batch in batches:
      row = {"model": name, "batch": batch, "bytes_per_second": None, "copy_bandwidth": bandwidth}
      try:
        seconds = seconds_to_generate(config, made, batch, generated)
        row["bytes_per_second"] = batch * generated / seconds
        row["share_of_floor"] = bytes_read(config, batch, generated) / bandwidth / seconds
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
      rows.append(row)
      print_row(row, rows)
    del made
  return rows


def print_row(row: dict, rows: list[dict]) -> None:
  speed = row["bytes_per_second"]
  if speed is None:
    print(f"{row['model']:<16} batch {row['batch']:>4}   out of memory", flush=True)
    return
  base = next((r for r in rows if r["model"] == "Transformer" and r["batch"] == row["batch"]), None)
  if base and base["bytes_per_second"]:
    row["speed_up"] = speed / base["bytes_per_second"]
  up = f"{row['speed_up']:>7.2f}x" if "speed_up" in row else " " * 8
  floor = f"{100 * row['share_of_floor']:>6.1f}% of floor" if "share_of_floor" in row else ""
  print(f"{row['model']:<16} batch {row['batch']:>4} {speed:>12,.1f} bytes/s {up} {floor}", flush=True)


def measure_peer(config: MegabyteConfig, generated: int, batches: list[int]) -> list[dict]:
  """The same by MEGABYTE-pytorch, under autocast to bfloat16 where there is a GPU."""
  import torch  # noqa: PLC0415
  from MEGABYTE_pytorch import MEGABYTE  # noqa: PLC0415

  device = "cuda" if torch.cuda.is_available() else "cpu"
  coarse, fine = config.levels
  made = MEGABYTE(
    num_tokens=256,
    dim=(coarse.width, fine.width),
    depth=(coarse.num_layers, fine.num_layers),
    max_seq_len=(config.context // coarse.patch_size, coarse.patch_size),
    dim_head=fine.heads[1],
    heads=fine.heads[0],
    flash_attn=True,
  )
  made = made.to(device).eval()
  rows = []
  for batch in batches:
    row = {"model": "MEGABYTE-pytorch", "batch": batch, "bytes_per_second": None}
    prime = torch.randint(1, 256, (batch, config.context - generated), device=device)
    try:
      with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        made.generate(prime[:, :1].repeat(1, config.context - 1))
        start = time.perf_counter()
        made.generate(prime).cpu()
        row["bytes_per_second"] = batch * generated / (time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
      torch.cuda.empty_cache()
    rows.append(row)
  return rows


def peer_rows() -> list[dict]:
  """Those of `measure_peer`, in a process of its own that gives its memory back."""
  command = [sys.executable, __file__, "--peer-only", *sys.argv[1:]]
  return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="full", choices=list(SIZES))
  parser.add_argument("--bytes", type=int, default=0, help="a sample; default: 8,192, tiny 256")
  parser.add_argument("--batches", default="", help="such as 1,8; default: 1,8,64,256, tiny 1,8")
  parser.add_argument("--peer-bytes", type=int, default=16)
  parser.add_argument("--peer-only", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  size = SIZES[args.size]
  batches = [int(b) for b in args.batches.split(",")] if args.batches else list(size.batches)
  if args.peer_only:
    print(json.dumps(measure_peer(size.megabyte, args.peer_bytes, batches)))
    return
  installed = all(importlib.util.find_spec(name) for name in ("torch", "MEGABYTE_pytorch"))
  peer = peer_rows() if installed else []  # before this process takes memory
  rows = measure(size, args.bytes or size.bytes, batches)
  for row in peer:
    rows.append(row)
    print_row(row, rows)
  if not installed:
    print("MEGABYTE-pytorch is not installed")
  for row in rows:
    print(json.dumps(row))


if __name__ == "__main__":
  main()
