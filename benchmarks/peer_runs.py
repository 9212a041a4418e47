"""Trains another package's MEGABYTE on the batches of benchmarks/recipe_runs.py and writes the same kind of JSON.

  python benchmarks/peer_runs.py MEGABYTE-pytorch megabyte:8:768x8:384x8 --train=C.train --validation=C.validation \
    --bytes=4.2e8 --output=rows/megabyte_pytorch.json
  python benchmarks/peer_runs.py SpaceByte megabyte:8:768x8:384x8 --clone=spacebyte --train=C.train \
    --validation=C.validation --bytes=4.2e8 --output=rows/spacebyte.json
  python benchmarks/peer_runs.py MEGABYTE-pytorch configs/quickstart.py --output=rows/quickstart_megabyte_pytorch.json

The model has the sizes of a config: of configs/recipe.py by name, or of a file. Windows, batches, their order and
validation by basic inference are those of recipe_runs.py. On a GPU the model is compiled and computes in bfloat16 by
autocast; on a CPU it is not compiled, and computes in float32. SpaceByte's MegaByte is trained by its own rule: AdamW
(0.9, 0.98) at 0.04, divided by the square root of the fan-in for matrices, decay 0.01, a quarter of a cosine after 1%
of warm-up. MEGABYTE-pytorch has none; it gets AdamW at 1e-3, decay 0.1 and a cosine to zero after 4% of warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peers
from recipe_runs import LOG_EVERY, named_config

from megabyte_jax.commands import command_line
from megabyte_jax.config import Config, MegabyteConfig, overrides
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import open_source
from megabyte_jax.errors import ConfigError, require
from megabyte_jax.evaluation.windows import windows_of
from megabyte_jax.files.atomic_file import replacing

Nats = Callable[[Any, Any], Any]  # (x_BT, scored_BT) -> the sum over the bytes that are scored


@dataclasses.dataclass(frozen=True)
class Rule:
  """Says how a package's model is trained.

  Attributes:
    learning_rate, weight_decay: AdamW's.
    warmup: share of the steps.
    quarter: whether the rate falls by the first quarter of a cosine, or by half of one.
  """

  learning_rate: float
  weight_decay: float
  warmup: float
  quarter: bool

  def factor(self, step: int, steps: int) -> float:
    """Returns what the learning rate is multiplied by in a step, counted from 0."""
    warmup = max(1, round(self.warmup * steps))
    rise = min(1.0, (step + 1) / warmup)
    if self.quarter:
      return rise * math.cos(0.5 * math.pi * step / steps)
    return rise * (0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))


RULES = {"MEGABYTE-pytorch": Rule(1e-3, 0.1, 0.04, False), "SpaceByte": Rule(0.04, 0.01, 0.01, True)}


def build(peer: str, config: MegabyteConfig, clone: str) -> tuple[Any, Nats]:
  """Builds a peer's model and the function (x_BT, scored_BT) -> nats of the scored bytes; the others must come last.

  MEGABYTE-pytorch gives logits without those of byte 0, and its loss with them: the mean over all that is no padding.
  """
  import torch  # noqa: PLC0415

  if peer == "SpaceByte":
    made = peers.spacebyte(config, clone)
  else:
    made = peers.megabyte_pytorch(config)
    peers.open_attention(made)
  compiled = torch.compile(made) if torch.cuda.is_available() else made

  def nats(x_BT, scored_BT):
    if peer == "MEGABYTE-pytorch":
      return compiled(x_BT.masked_fill(~scored_BT, made.pad_id), return_loss=True) * scored_BT.sum()
    begun = torch.nn.functional.pad(x_BT, (1, 0), value=made.config.BOS)[:, :-1]
    logits = compiled(begun)[0].float().flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, x_BT.flatten(), reduction="none")
    return (each * scored_BT.flatten()).sum()

  return made, nats


def train(config: Config, model: Any, nats: Nats, rule: Rule, steps: int, parts: int) -> tuple[list, float]:
  """Trains a model; returns the curve of (step, bits per byte), and seconds for a step after the first points."""
  import torch  # noqa: PLC0415

  device = next(model.parameters()).device
  groups: dict[float, list] = {}
  for parameter in model.parameters():
    groups.setdefault(getattr(parameter, "lr_mult", 1.0), []).append(parameter)
  optimizer = torch.optim.AdamW(
    [{"params": group, "times": times} for times, group in groups.items()],
    lr=rule.learning_rate,
    betas=(0.9, 0.98),
    weight_decay=rule.weight_decay,
  )
  curve, sums, start = [], [], time.perf_counter()
  source = open_source(config.data, "train")
  context = config.model.context
  for number, rows in batches(source, batch_size=config.batch_size, context=context, seed=config.seed, num_steps=steps):
    x_BT = torch.from_numpy(np.asarray(rows.x_BT, np.int64)).to(device)
    for group in optimizer.param_groups:
      group["lr"] = rule.learning_rate * group["times"] * rule.factor(number, steps)
    for part in x_BT.chunk(parts):
      with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = nats(part, torch.ones_like(part, dtype=torch.bool)) / part.numel()
      (loss / parts).backward()
      sums.append(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if (number + 1) % LOG_EVERY == 0 or number + 1 == steps:
      curve.append((number + 1, round(float(torch.stack(sums).mean()) / math.log(2), 5)))
      sums.clear()
      print(f"step {number + 1}/{steps} bits {curve[-1][1]} {time.perf_counter() - start:.0f} s", flush=True)
      if len(curve) == 1:
        start = time.perf_counter()  # without what compiling takes
  return curve, (time.perf_counter() - start) / max(1, steps - curve[0][0])


def evaluate(config: Config, nats: Nats, rows: int, device: Any) -> tuple[float, int]:
  """Returns the nats of all validation bytes by basic inference, and their number; `rows` windows at a time."""
  import torch  # noqa: PLC0415

  source, context = open_source(config.data, "validation"), config.model.context
  windows = [(i, w) for i, size in enumerate(source.lengths) for w in windows_of(int(size), config.model)]
  total = 0.0
  for first in range(0, len(windows), rows):
    x_BT, lengths = np.zeros((rows, context), np.int64), np.zeros(rows, np.int64)  # one shape is compiled
    for row, (document, window) in enumerate(windows[first : first + rows]):
      x_BT[row, : window.length] = source.read(document, window.start, window.start + window.length)
      lengths[row] = window.length
    scored_BT = np.arange(context)[None] < lengths[:, None]
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
      total += float(nats(torch.from_numpy(x_BT).to(device), torch.from_numpy(scored_BT).to(device)))
  return total, int(source.lengths.sum())


def read_config(arguments: argparse.Namespace) -> tuple[Config, MegabyteConfig]:
  """Returns the config that the command line names, with its data and batch, and its model.

  Raises:
    ConfigError: it is no MEGABYTE of two levels, its data are missing, or --parts does not divide its batch.
  """
  is_file = ".py" in arguments.name
  if is_file:
    values = Config.from_dict(overrides.load("CONFIG", arguments.name)).to_dict()
  else:
    values = named_config(arguments.name)
  for split in ("train", "validation"):
    values["data"][split] = getattr(arguments, split) or values["data"][split]
  values["batch_size"] = arguments.batch_size or values["batch_size"]
  config = Config.from_dict(values)
  if not isinstance(config.model, MegabyteConfig) or len(config.model.levels) != 2:
    raise ConfigError(f"{arguments.name}: the packages have a MEGABYTE of two levels, which this is not")
  require(is_file or (arguments.train and arguments.validation), "--train and --validation are missing")
  require(not config.windows_may_be_short, f"{arguments.name}: windows of one document each are not for these packages")
  rows, parts = config.batch_size, arguments.parts
  require(rows % parts == 0, f"--parts={parts} does not divide the {rows} windows of a batch")
  return config, config.model


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Trains and evaluates; returns the contents of the row's file."""
  import torch  # noqa: PLC0415

  config, sizes = read_config(arguments)
  per_step = config.batch_size * config.model.context
  steps = max(2, round(arguments.bytes / per_step)) if arguments.bytes else config.num_steps
  rule = RULES[arguments.peer]
  if arguments.learning_rate:
    rule = dataclasses.replace(rule, learning_rate=arguments.learning_rate)
  torch.manual_seed(config.seed)
  torch.set_float32_matmul_precision("high")
  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  model, nats = build(arguments.peer, sizes, arguments.clone)
  model.to(device)
  curve, seconds = train(config, model, nats, rule, steps, arguments.parts)
  total, count = evaluate(config, nats, config.batch_size // arguments.parts, device)
  on_gpu = device.type == "cuda"
  return {
    "peer": arguments.peer,
    "name": arguments.name,
    "validation_bpb": round(total / count / math.log(2), 5),
    "validation_bytes": count,
    "train_bpb_of_last_steps": curve[-1][1],
    "train_bytes": steps * per_step,
    "corpus_bytes": int(open_source(config.data, "train").lengths.sum()),
    "learning_rate": rule.learning_rate,
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "bytes_per_second": per_step / seconds if len(curve) > 1 else None,
    "peak_memory": torch.cuda.max_memory_allocated() if on_gpu else None,
    "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    "shared_device": arguments.shared,
    "versions": {"torch": torch.__version__, arguments.peer: _version(arguments.peer, arguments.clone)},
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    "curve": curve,
    "config": config.to_dict(),
  }


def _version(peer: str, clone: str) -> str:
  """Returns the package's version, or the commit of the checkout, or unknown."""
  if peer != "SpaceByte":
    return importlib.metadata.version(peer)
  if not (pathlib.Path(clone) / ".git").exists():
    return "unknown"
  command = ["git", "-C", clone, "rev-parse", "HEAD"]
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("peer", choices=list(RULES))
  parser.add_argument(
    "name", metavar="CONFIG", help="a name of configs/recipe.py, or a config file: its sizes are taken"
  )
  parser.add_argument("--clone", default="", help="of github.com/kjslag/spacebyte")
  parser.add_argument("--train", default="", help="instead of the config's")
  parser.add_argument("--validation", default="", help="instead of the config's")
  parser.add_argument("--bytes", type=float, default=0, help="of training, instead of the config's steps")
  parser.add_argument("--parts", type=int, default=2, help="equal parts of a batch, one after the other")
  parser.add_argument("--learning-rate", type=float, default=0.0, help="instead of the rule's")
  parser.add_argument("--batch-size", type=int, default=0, help="windows, instead of the config's")
  parser.add_argument("--shared", action="store_true", help="note that another run shares the device")
  parser.add_argument("--output", type=pathlib.Path, required=True)
  return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  arguments = parse_arguments(given)
  row = run(arguments)
  arguments.output.parent.mkdir(parents=True, exist_ok=True)
  with replacing(arguments.output) as path:
    path.write_text(json.dumps(row) + "\n")
  print(f"{arguments.peer} {arguments.name}: {row['validation_bpb']} bits per byte", flush=True)


if __name__ == "__main__":
  command_line.run(main)
