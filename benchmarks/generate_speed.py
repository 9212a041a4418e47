"""Times generation: MEGABYTE against a byte-level Transformer, each against the memory that it must read.

  python benchmarks/generate_speed.py                         one GPU or TPU, full size
  python benchmarks/generate_speed.py --weights=int8          and again with matrices in 8 bits (generate --weights)
  python benchmarks/generate_speed.py --size=tiny             a smoke test on a CPU

Full size: MEGABYTE of 24 x 2048 and 15 x 1024 (P = 8, 8,192 bytes, 1.4B parameters) and a Transformer of 24 x 1024
(context 1,024, which moves by half when it is full), --bytes from an empty prompt. A short call before compiles the
same programs. Where torch and MEGABYTE-pytorch are installed, that package's MEGABYTE of the same widths, depths,
heads and context is timed too (peers.py): it has no cache, so each of its bytes costs a forward pass over all before
it. Single bytes at --peer-places places spread evenly over the context are enough to know what all of them take.

Columns: bytes/s of all samples together; seconds for 8,192 bytes of each sample; the share of the floor; bytes/s
against the Transformer, and against MEGABYTE-pytorch, of the same batch. The floor is the time in which the parameters
and the filled part of the caches can be read once for every step that uses them, in the dtype of the computation, at
the bandwidth of a copy that is measured in the same run; of matrices in 8 bits one byte a weight and four a scale.
Rows of such matrices are compared with a Transformer of the same format. What fits into a cache of the chip, as all of
the tiny size does, can be faster than that. Last come lines of JSON. --output=docs/results/NAME.json also writes what
`python -m megabyte_jax tables 9` shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # what is left is told at its true size

import jax
import own_process
import peers
from device_limits import copy_bandwidth
from flax import nnx

from megabyte_jax import Level, MegabyteConfig, generate
from megabyte_jax.commands.arguments import Parser
from megabyte_jax.evaluation import windows
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models.build import cast_for_decoding, initial_parameters, make_model
from megabyte_jax.models.parameters import compute_dtype
from megabyte_jax.paper.printed_numbers import TABLES
from megabyte_jax.parallel.compilation_cache import keep_compiled_programs

PEER = "MEGABYTE-pytorch"
ROWS = {"Transformer": "table9:transformer", "MEGABYTE": "table9:megabyte"}  # of the paper's table
PAPER_BYTES = 8192
AGAIN_SECONDS = 10.0  # a call that takes longer is not repeated


@dataclasses.dataclass(frozen=True)
class Size:
  """Names what is compared: the two models, and how much."""

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


def bytes_read(config: MegabyteConfig, batch: int, generated: int, weights: str = "") -> int:
  """Counts bytes of parameters and filled caches that `batch` samples of `generated` bytes read, without a prompt."""
  width = compute_dtype(config).itemsize
  parameters = jax.eval_shape(lambda: cast_for_decoding(config, initial_parameters(config, jax.random.key(0)), weights))
  total = 0
  for i, (level, span) in enumerate(zip(config.levels, config.spans, strict=True)):
    last = i == len(config.levels) - 1
    names = ["decoder"] + ["from_parent"] * (i > 0)
    used = jax.tree.leaves([parameters["levels"][i][name] for name in names])
    of_step = sum(leaf.size * leaf.dtype.itemsize for leaf in used)
    of_step += last * width * config.vocab_size * level.byte_width  # the output's table
    entry = 2 * level.num_layers * level.heads[0] * level.heads[1]  # keys and values of a slot
    for position in range(0, generated, level.patch_size):
      slots = (position - windows.window_start(position, config)) % span // level.patch_size
      total += of_step + width * batch * slots * entry
  return total


def seconds_to_generate(config: MegabyteConfig, made, batch: int, generated: int, weights: str) -> float:
  """Times the better of two calls, or one that takes long, after short ones that compile."""
  prompts = (b"", bytes(config.context))  # after the second the window has moved
  for prompt in prompts[: 1 + (generated > config.context)]:
    generate(made, prompt, 1, num_samples=batch, weights=weights)

  def once() -> float:
    start = time.perf_counter()
    generate(made, b"", generated, num_samples=batch, weights=weights)
    return time.perf_counter() - start

  first = once()
  return min(first, once()) if first < AGAIN_SECONDS else first


def speeds(name: str, batch: int, generated: int, seconds: float) -> dict:
  """Computes a row's numbers."""
  per_sample = seconds / generated
  return {
    "model": name,
    "batch": batch,
    "bytes_per_second": batch / per_sample,
    "seconds_per_8192_bytes": PAPER_BYTES * per_sample,
  }


def measure(
  size: Size,
  generated: int,
  batches: list[int],
  peer: list[dict],
  keep: Callable[[list[dict]], None],
  formats: Sequence[str] = ("",),
) -> list[dict]:
  """Measures one row for each model, batch and format of weights, beside the peer's.

  A batch that memory cannot hold has an error.

  Args:
    formats: of weights, as `generate` takes them.
    keep: called with all rows so far, so that a run that is cut off leaves what it measured.
  """
  bandwidth = copy_bandwidth(size.copy_bytes)
  device = {"device": jax.devices()[0].device_kind, "versions": f"jax {jax.__version__}", "copy_bandwidth": bandwidth}
  print(f"{device['device']}, {device['versions']}, copy bandwidth {bandwidth / 1e9:,.0f} GB/s")
  rows = list(peer)
  for row in rows:
    print_row(row, rows)
  for name, config in (("Transformer", size.transformer), ("MEGABYTE", size.megabyte)):
    made = make_model(config, nnx.Rngs(0))
    for batch, weights in itertools.product(batches, formats):
      try:
        seconds = seconds_to_generate(config, made, batch, generated, weights)
        row = speeds(name, batch, generated, seconds)
        row["share_of_floor"] = bytes_read(config, batch, generated, weights) / bandwidth / seconds
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        row = {"model": name, "batch": batch, "error": "out of memory"}
      rows.append(row | ({"weights": weights} if weights else {}) | device)
      print_row(rows[-1], rows)
      keep(rows)
    del made
  return rows


def print_row(row: dict, rows: list[dict]) -> None:
  """Prints a row, and notes in it how much faster it is than the others of its batch that are there."""
  weights = row.get("weights", "")
  begin = f"{row['model']:<16} {weights:<4} batch {row['batch']:>4}"
  if "error" in row:
    print(f"{begin}   {row['error']}", flush=True)
    return
  speed, ups = row["bytes_per_second"], []
  for other, key in (("Transformer", "speed_up"), (PEER, "speed_up_on_peer")):
    alike = other, row["batch"], weights if other != PEER else ""
    same = (r for r in rows if (r["model"], r["batch"], r.get("weights", "")) == alike and "error" not in r)
    base = next(same, None)
    if base and row["model"] != other:
      row[key] = speed / base["bytes_per_second"]
    ups.append(f"{row[key]:,.2f}x {other}" if key in row else "")
  plain = (r for r in rows if (r["model"], r["batch"]) == (row["model"], row["batch"]) and "weights" not in r)
  if weights and (base := next(plain, None)) and "error" not in base:
    row["speed_up_by_weights"] = speed / base["bytes_per_second"]
    ups.append(f"{row['speed_up_by_weights']:,.2f}x without")
  floor = f"{100 * row['share_of_floor']:.1f}% of floor" if "share_of_floor" in row else ""
  print(
    f"{begin} {speed:>12,.1f} bytes/s {row['seconds_per_8192_bytes']:>9,.2f} s/8,192 {floor:>15} "
    f"{ups[0]:>18} {' '.join(ups[1:]):>24}",
    flush=True,
  )


def paper_speed_up() -> float:
  """Returns the speed-up of MEGABYTE over the Transformer in Table 9."""
  seconds: dict[str, Any] = {row.config: row.paper["seconds_to_generate"] for row in TABLES["9"].rows}
  return seconds[ROWS["Transformer"]] / seconds[ROWS["MEGABYTE"]]


def results(rows: list[dict], generated: int, run: dict) -> dict:
  """Makes a results file: for the paper's rows those of batch 1 (megabyte_jax/paper/measured.py), and all else."""
  ours = [r for r in rows if r["model"] in ROWS and r["batch"] == 1 and not r.keys() & {"error", "weights"}]
  note = "untrained, without cross-patch attention, one sample, {generated:,} bytes, {device}, {versions}, {date}"
  return {
    **run,
    "rows": [
      {
        "row": ROWS[r["model"]],
        "seconds_to_generate": r["seconds_per_8192_bytes"],
        "note": note.format(generated=generated, **r, **run),
      }
      for r in ours
    ],
    "measured": rows,
  }


def measure_peer(config: MegabyteConfig, count: int, batches: list[int]) -> list[dict]:
  """Measures the same by MEGABYTE-pytorch, on a GPU under autocast to bfloat16, from bytes at `count` places."""
  import torch  # noqa: PLC0415

  on_gpu = torch.cuda.is_available()
  name = torch.cuda.get_device_name() if on_gpu else "cpu"
  made = peers.megabyte_pytorch(config).to("cuda" if on_gpu else "cpu").eval()

  def seconds(batch: int, length: int) -> float:
    """For the byte after `length` others, as its generate() gets it."""
    prime = torch.randint(0, 256, (batch, length), device="cuda" if on_gpu else "cpu")
    if on_gpu:
      torch.cuda.synchronize()
    start = time.perf_counter()
    made(prime)[:, -1].argmax(-1).cpu()
    return time.perf_counter() - start

  rows = []
  for batch in batches:
    try:
      with torch.inference_mode(), torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16, enabled=on_gpu):
        places = [config.context * (2 * i + 1) // (2 * count) for i in range(count)]
        a_byte = statistics.mean(min(seconds(batch, place) for _ in range(2)) for place in places)
        row = speeds(PEER, batch, 1, a_byte)
    except RuntimeError as error:  # out of memory, or a batch that one of its kernels cannot take
      row = {"model": PEER, "batch": batch, "error": str(error).partition("\n")[0][:200]}
    rows.append(row | {"device": name, "versions": f"torch {torch.__version__}"})
  return rows


def peer_rows() -> list[dict]:
  """Returns the rows of `measure_peer`, run in a process of its own that frees its memory; none where it fails."""
  found = own_process.last_line(__file__, ["--peer-only", *sys.argv[1:]])
  if isinstance(found, list):
    return found
  print(f"{PEER} could not be timed: {found['error']}", flush=True)
  return []


def main() -> None:
  parser = Parser("python benchmarks/generate_speed.py", description=__doc__)
  parser.add_argument("--size", default="full", choices=list(SIZES))
  parser.add_argument("--bytes", type=int, default=0, help="a sample; default: 8,192, tiny 256")
  parser.add_argument("--batches", default="", help="such as 1,8; default: 1,8,64,256, tiny 1,8")
  parser.add_argument("--weights", default="", choices=["", "int8"], help="int8: timed beside the compute dtype")
  parser.add_argument("--peer-places", type=int, default=8, help="where MEGABYTE-pytorch is timed")
  parser.add_argument("--output", default="", help="a results file, JSON; of the full size only")
  parser.add_argument("--peer-only", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.output and args.size != "full":
    parser.error("--output is for the models of the paper's table: --size=full")
  keep_compiled_programs()
  size = SIZES[args.size]
  batches = [int(b) for b in args.batches.split(",")] if args.batches else list(size.batches)
  if args.peer_only:
    print(json.dumps(measure_peer(size.megabyte, args.peer_places, batches)))
    return
  run = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
  generated = args.bytes or size.bytes
  print(f"{run['date']} {run['command']}: {generated:,} bytes a sample")
  if peers.installed(PEER):
    peer = peer_rows()  # before this process takes memory
  else:
    peer = []
    print(f"{PEER} is not installed")

  def keep(rows: list[dict]) -> None:
    if args.output:
      with replacing(args.output) as path:
        path.write_text(json.dumps(results(rows, generated, run), indent=2) + "\n")

  rows = measure(size, generated, batches, peer, keep, ["", args.weights] if args.weights else [""])
  for row in rows:
    if row["model"] == "MEGABYTE" and "speed_up" in row:
      place = " ".join(filter(None, [f"at batch {row['batch']}", row.get("weights", "")]))
      print(f"MEGABYTE / Transformer {place}: {row['speed_up']:.2f}x; the paper's Table 9: {paper_speed_up():.2f}x")
  for row in rows:
    print(json.dumps(row | run))


if __name__ == "__main__":
  main()
