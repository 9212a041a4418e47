"""Trains the systems of Table 3 at equal FLOPs on one corpus: word-level perplexity, bits per byte, bytes per second.

  python benchmarks/subword_systems.py --train=corpora/books/train --validation=corpora/books/validation --flops=1e17 \
    --output=docs/results/table3.json

The models are the rows of configs/paper/table3.py at a smaller size by the rule of configs/small.py: `table3:NAME@2`,
with the recipe of --changes; --row NAME=FILE:ARGUMENT takes another config for a system. Each gets as many steps as
--flops operations pay for, counted as SpaceByte counts them: six for each multiplication and addition of a weight,
attention as if nothing were masked. A tokenizer is trained on the training text unless --tokenizer names one.
`python -m megabyte_jax tables 3` shows the results beside the paper's. A system that is in the file already is left
out, so that the same command goes on after an interruption. Inference is basic and, where the row has another method,
by that one too, whose figures are the entry's own.

--set changes fields of all configs, or with NAME: before them of one; values are JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import io
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import recipe_runs

from megabyte_jax.commands import command_line
from megabyte_jax.config import CheckpointConfig, Config, DataConfig, overrides
from megabyte_jax.data.subwords.tokenizer import load_tokenizer
from megabyte_jax.data.subwords.training import train_tokenizer
from megabyte_jax.display.progress import human
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models.flops import flops_per_byte
from megabyte_jax.paper.rows_by_name import ROOT, rows_of_file

sys.path.insert(0, str(ROOT))

import eval as evaluation
import train

_SMALL = pathlib.Path(__file__).parents[1] / "configs" / "small.py"


def make_config(name: str, arguments: argparse.Namespace, tokenizer: str) -> Config:
  """Returns the config of a system, with as many steps as the budget pays for."""
  own_norm = name == "block_recurrent" and arguments.changes in ("+modern", "+scaled")  # of queries and keys
  row = f"{_SMALL}:table3:{name}@{arguments.divisor}{arguments.changes}{'-qk_norm' if own_norm else ''}"
  given = dict(spec.split("=", 1) for spec in arguments.configs)
  values = Config.from_dict(overrides.load("NAME", given.get(name, row), [])).to_dict()
  subwords = values["data"]["form"] == "subwords"
  values["data"].update(train=arguments.train, validation=arguments.validation, test="")
  if subwords:
    values["data"]["tokenizer"] = tokenizer
    values["model"]["vocab_size"] = load_tokenizer(tokenizer).size
  for change in arguments.changes_of_fields:
    key, _, value = change.partition("=")
    of, _, field = key.rpartition(":")
    if of in ("", name):
      recipe_runs.changed(values, field, json.loads(value))
  config = Config.from_dict(values)
  per_step = config.bytes_per_step
  steps = max(2, round(arguments.flops / flops_per_byte(config.model, attention="whole", training=True) / per_step))
  return dataclasses.replace(
    config,
    seed=arguments.seed,
    num_steps=steps,
    optimizer=dataclasses.replace(config.optimizer, warmup_steps=max(1, round(0.04 * steps))),
    checkpoint=CheckpointConfig(every_steps=0),
    eval=dataclasses.replace(config.eval, every_steps=0),
    log_every=max(1, min(10, steps // 10)),
  )


def evaluate(workdir: pathlib.Path, method: str) -> dict[str, Any]:
  """Returns what eval.py says of a trained system by an inference method."""
  flags = [f"--workdir={workdir}", f"--method={method}", "--words=count", "--no-compressors"]
  with contextlib.redirect_stdout(io.StringIO()):
    return json.loads(evaluation.main(flags))


def run(name: str, config: Config, workdir: pathlib.Path, flops: float) -> dict[str, Any]:
  """Trains and evaluates one system and returns its entry in the results; `curve` has (step, bits per byte)."""
  if not train.train(config, str(workdir)):
    raise SystemExit("stopped; give the same command again")
  methods = list(dict.fromkeys(("basic", config.eval.method)))
  by_method = {method: evaluate(workdir, method) for method in methods}
  scored = by_method[config.eval.method]
  lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
  speeds = [one["bytes_per_second"] for one in lines if one.get("bytes_per_second")]
  bits = [(one["step"], one["bpb"]) for one in lines if "bpb" in one]
  curve = [point for point in bits if point[0] % recipe_runs.LOG_EVERY == 0 or point == bits[-1]]
  device = jax.devices()[0].device_kind
  size = human(config.model.parameter_count())
  return {
    "row": f"table3:{name}",
    **{key: scored[key] for key in ("bpb", "word_perplexity", "bytes", "words", "method", "cost", "split")},
    "bpb_by_method": {method: found["bpb"] for method, found in by_method.items()},
    "bytes_per_token": scored["bytes"] / scored.get("tokens", scored["bytes"]),
    "bytes_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,  # the first may compile
    "train_bpb": curve[-1][1],
    "curve": curve,
    "trained_on": config.num_steps * config.bytes_per_step,  # bytes or tokens
    "parameters": config.model.parameter_count(),
    "flops": flops,
    "note": f"{human(flops, 'FLOP')} of training, {size} parameters, {device}",
    "device": f"{jax.device_count()} x {device}",
    "versions": {package: importlib.metadata.version(package) for package in ("jax", "flax", "optax")},
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    "config": config.to_dict(),
  }


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line."""
  names = list(rows_of_file("table3"))
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--train", required=True)
  parser.add_argument("--validation", required=True)
  parser.add_argument("--flops", type=float, required=True, help="of training, for each system")
  parser.add_argument("--systems", nargs="+", choices=names, default=names)
  parser.add_argument("--divisor", type=int, default=2, help="of widths and layers, as in configs/small.py")
  parser.add_argument("--changes", default="+modern", help="a recipe, as in configs/small.py; '' has none")
  parser.add_argument("--row", dest="configs", nargs="+", default=[], metavar="NAME=FILE:ARGUMENT")
  parser.add_argument("--tokenizer", default="", help="of the subword systems")
  parser.add_argument("--pieces", type=int, default=32_000, help="of a new tokenizer")
  parser.add_argument("--set", dest="changes_of_fields", nargs="+", default=[], metavar="[NAME:]KEY=VALUE")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--shared", action="store_true", help="note that another run shares the device")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/table3_small"))
  parser.add_argument("--output", type=pathlib.Path, required=True)
  return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
  """Trains the systems that are not in the results yet."""
  arguments = parse_arguments(given)
  results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": []}
  done = {entry["row"] for entry in results["rows"]}
  tokenizer = arguments.tokenizer or str(arguments.workdir / "tokenizer.model")
  forms = rows_of_file("table3")
  if any(forms[name].data.form == "subwords" for name in arguments.systems) and not pathlib.Path(tokenizer).exists():
    train_tokenizer([arguments.train], tokenizer, arguments.pieces, DataConfig())
  command = " ".join(["python benchmarks/subword_systems.py", *(sys.argv[1:] if given is None else given)])
  for name in arguments.systems:
    if f"table3:{name}" in done:
      continue
    config = make_config(name, arguments, tokenizer)
    entry = run(name, config, arguments.workdir / name, arguments.flops)
    entry |= {"command": command, "shared_device": arguments.shared}
    results["rows"].append(entry)
    with replacing(arguments.output) as path:
      path.write_text(json.dumps(results, indent=1) + "\n")
    speed = human(entry["bytes_per_second"] or 0, "B/s")
    print(f"{name}: word perplexity {entry['word_perplexity']}, {entry['bpb']:.4f} bits per byte, {speed}", flush=True)


if __name__ == "__main__":
  command_line.run(main)
