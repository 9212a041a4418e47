"""Measures time and memory against length: one training step on one sequence, from 8 kB to 100 MB.

  python benchmarks/long_sequences.py --output=docs/results/long_sequences    one GPU
  python benchmarks/long_sequences.py --shortest=1e8                          the longest alone: three minutes
  python benchmarks/long_sequences.py --size=tiny                             a smoke test on a CPU

MEGABYTE is the Image640 model of Table 5 (12 x 768 global and 8 x 768 local, P = 192, no cross-patch attention), the
Transformer a byte-level one of as many layers of the same width; each has positions for as many bytes as the sequence.
All programs are compiled first, side by side; each then runs one step (of two, where one takes less than 20 s), AdamW
included, bfloat16, on random bytes. Memory is what the compiled program needs: state, activations and workspace.

Writes OUTPUT.json, OUTPUT_time.png and OUTPUT_memory.png, and prints a table.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import json
import math
import sys
import time
from typing import Any

import jax
import numpy as np

from megabyte_jax.commands.arguments import Parser
from megabyte_jax.config import Config, Level, MegabyteConfig
from megabyte_jax.display import plots
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models import flops
from megabyte_jax.models.loss import bits_per_byte
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh
from megabyte_jax.planning.lowering import lower, memory_of
from megabyte_jax.training.state import initial_state

# Whole patches of 192 and, from the second on, whole tiles of attention kernels.
LENGTHS = {
  "MEGABYTE": (8_064, 24_576, 196_608, 1_228_800, 9_830_400, 100_024_320),
  "Transformer": (8_192, 32_768, 131_072, 262_144),
}
TINY_LENGTHS = {"MEGABYTE": (384, 1_536), "Transformer": (128, 256)}
PATCHES_OF_A_GROUP = 512  # whose local activations are in memory together
AGAIN_SECONDS = 20.0


def config(model: str, length: int, *, tiny: bool = False) -> Config:
  """Returns the config that trains on one sequence of `length` bytes."""
  if model == "MEGABYTE":
    shape, layers = ((192, 32), (1, 1)) if tiny else ((768, 768), (12, 8))
    levels = [
      Level(patch_size=size, width=width, num_layers=n, num_heads=max(1, width // 64))
      for size, width, n in zip((192, 1), shape, layers, strict=True)
    ]
  else:
    width, num_layers = (32, 2) if tiny else (768, 20)
    levels = [Level(patch_size=1, width=width, num_layers=num_layers, num_heads=max(1, width // 64))]
  made = MegabyteConfig(context=length, levels=tuple(levels))
  groups = max(1, length // 192 // PATCHES_OF_A_GROUP) if model == "MEGABYTE" else 1
  made = dataclasses.replace(made, dropout=0.0, remat="full", scan_layers="always", patch_groups=groups)
  return Config(model=made, batch_size=1, num_steps=1_000)


class Program:
  """The compiled training step of a model on one sequence, without its memory."""

  def __init__(self, model: str, length: int, *, tiny: bool):
    self.model, self.length, self.config = model, length, config(model, length, tiny=tiny)
    self.mesh = make_mesh(self.config.mesh, jax.devices()[:1])
    self.compiled = lower(self.config, self.mesh, "train").compile()

  def run(self) -> dict:
    """Runs a step and returns its row: of the second step, unless the first takes long."""
    row: dict[str, Any] = {"model": self.model, "bytes": self.length, "memory_bytes": sum(memory_of(self.compiled))}
    with jax.set_mesh(self.mesh):
      state = initial_state(self.config, self.mesh)
      x_BT = np.random.default_rng(0).integers(0, 256, (1, self.length), np.uint8)
      x_BT = jax.device_put(x_BT, batch_sharding(self.mesh))
      jax.block_until_ready((state, x_BT))
      for _ in range(2):
        begin = time.perf_counter()
        state, metrics = self.compiled(state, x_BT, None, None)  # no row is short
        nats = float(metrics["nats"])  # waits
        row["seconds"] = time.perf_counter() - begin
        if row["seconds"] > AGAIN_SECONDS:
          break
    row["bits_per_byte"] = bits_per_byte(nats, self.length)
    row["gradient_norm"] = float(metrics["grad_norm"])
    row["model_flops_per_second"] = (
      flops.flops_per_byte(self.config.model, training=True) * self.length / row["seconds"]
    )
    if not math.isfinite(row["bits_per_byte"] + row["gradient_norm"]):
      raise FloatingPointError(f"{self.model} of {self.length:,} bytes: the loss or its gradient is not finite")
    return row


def show(row: dict) -> None:
  """Prints one line of the table."""
  print(f"{row['model']:<12} {row['bytes']:>12,}", end=" ")
  if "error" in row:
    print(row["error"], flush=True)
    return
  nanoseconds, gib = 1e9 * row["seconds"] / row["bytes"], row["memory_bytes"] / 2**30
  print(
    f"{row['seconds']:>9.3f} s {nanoseconds:>10,.0f} ns/byte {gib:>7.2f} GiB "
    f"{row['model_flops_per_second'] / 1e12:>6.1f} TFLOP/s {row['bits_per_byte']:.3f} bits/byte, gradient "
    f"{row['gradient_norm']:.3g}",
    flush=True,
  )


def draw(rows: list[dict], device: str, output: str) -> None:
  """Draws the two pictures."""

  def curves(value):
    names = dict.fromkeys(row["model"] for row in rows)
    series = {name: [row for row in rows if row["model"] == name] for name in names}
    return {name: ([row["bytes"] for row in of], [value(row) for row in of]) for name, of in series.items()}

  title = f"Training on one sequence, {device}"
  for name, ylabel, value in (
    ("time", "nanoseconds a byte", lambda row: 1e9 * row["seconds"] / row["bytes"]),
    ("memory", "memory (GiB)", lambda row: row["memory_bytes"] / 2**30),
  ):
    plots.lines(curves(value), title, "sequence length (bytes)", ylabel, f"{output}_{name}.png", log=True)


def main() -> None:
  parser = Parser("python benchmarks/long_sequences.py", description=__doc__)
  parser.add_argument("--size", default="full", choices=("full", "tiny"))
  parser.add_argument("--shortest", type=float, default=0, help="leave out sequences of fewer bytes")
  parser.add_argument("--longest", type=float, default=math.inf, help="leave out sequences of more bytes")
  parser.add_argument("--output", default="", help="OUTPUT.json, OUTPUT_time.png and OUTPUT_memory.png are written")
  args = parser.parse_args()
  tiny = args.size == "tiny"
  lengths = TINY_LENGTHS if tiny else LENGTHS
  wanted = [(model, length) for model in lengths for length in lengths[model]]
  wanted = [(model, length) for model, length in wanted if args.shortest <= length <= args.longest]
  wanted.sort(key=lambda which: which[1])
  run = {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": " ".join(sys.argv),
    "device": jax.devices()[0].device_kind,
    "versions": f"jax {jax.__version__}",
  }
  print(*run.values())
  rows = []
  with concurrent.futures.ThreadPoolExecutor() as pool:
    programs = [pool.submit(Program, *which, tiny=tiny) for which in wanted]
    concurrent.futures.wait(programs)
  for (model, length), program in zip(wanted, programs, strict=True):
    try:
      rows.append(program.result().run())
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      rows.append({"model": model, "bytes": length, "error": "out of memory"})
    show(rows[-1])
    if args.output:
      with replacing(args.output + ".json") as path:
        path.write_text(json.dumps(run | {"measured": rows}, indent=1) + "\n")
  if args.output:
    draw([row for row in rows if "error" not in row], run["device"], args.output)


if __name__ == "__main__":
  main()
