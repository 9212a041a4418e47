"""Trains one small model by a recipe and writes what came out as JSON: a row of docs/results.md's tables of recipes.

  python benchmarks/recipe_runs.py megabyte:4:768x6:384x6+modern --train=C.train --validation=C.validation \
    --bytes=4.2e8 --output=rows/p4_modern.json --set optimizer.learning_rate=2e-3 model.levels[1].cross_patch=4

The model and recipe are named as in configs/recipe.py; --set changes fields of its config, values are JSON. Training is
that of train.py without checkpoints. With --flops instead of --bytes the run gets as many bytes as that many operations
pay for, counted as SpaceByte counts them: six for each multiplication and addition of a weight, attention as if nothing
were masked.

--switch=SHARE trains the first part of the steps without cross-patch attention. --diagnose=N measures every N steps
how far gradients of each level reach and what the first level contributes: the bits per byte by which a batch becomes
worse when the first level's output is that of another text.

Where a window is a part of an image, --documents_per_step=N takes those of a step from N images, the same ones that a
model gets in this step whose N windows are whole images. Without it nearly each would be of another image.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from megabyte_jax.checkpoints.exported import export_model
from megabyte_jax.commands import command_line
from megabyte_jax.config import Config, MegabyteConfig, overrides
from megabyte_jax.data.batches import AnyWindows, Place, Windows, draw_batches, open_windows
from megabyte_jax.data.open_data import open_source
from megabyte_jax.data.sources import Mixture, Source
from megabyte_jax.errors import require
from megabyte_jax.evaluation.evaluate import evaluate
from megabyte_jax.evaluation.windows import METHODS, check_method, windows_of
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models.build import abstract_model
from megabyte_jax.models.flops import flops_per_byte
from megabyte_jax.models.global_and_local import finer_levels
from megabyte_jax.models.loss import bits_per_byte, sum_of_nats
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh
from megabyte_jax.training.state import initial_state, make_train_step

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs" / "recipe.py"
LOG_EVERY = 50  # steps between the points of a curve


def named_config(name: str) -> dict[str, Any]:
  """Returns the config that configs/recipe.py has under a name, as plain dicts."""
  return Config.from_dict(overrides.load("NAME", f"{_CONFIGS}:{name}", [])).to_dict()


def changed(values: Any, key: str, value: Any) -> None:
  """Sets `model.levels[1].rotary` and the like in nested dicts and lists."""
  *parents, last = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key)]
  for parent in parents:
    values = values[parent]
  if isinstance(values, dict) and last not in values:
    raise SystemExit(f"{key}: there is no {last}; choose one of {', '.join(values)}")
  values[last] = value


def make_config(arguments: argparse.Namespace) -> Config:
  """Returns the named config with the changes, the data, and the number of steps that the budget pays for."""
  values = named_config(arguments.name)
  values["data"].update(train=arguments.train, validation=arguments.validation)
  values["seed"] = arguments.seed
  for change in arguments.changes:
    key, _, value = change.partition("=")
    changed(values, key, json.loads(value))
  config = Config.from_dict(values)
  per_step = config.bytes_per_step
  total = arguments.bytes or arguments.flops / flops_per_byte(config.model, attention="whole", training=True)
  steps = max(2, round(total / per_step))
  share = arguments.warmup
  optimizer = dataclasses.replace(config.optimizer, warmup_steps=max(1, round(share * steps)))
  return dataclasses.replace(config, num_steps=steps, optimizer=optimizer)


class FewDocuments(Windows):
  """Training windows that are drawn so many in a row from one document, all documents being equally long.

  Documents come in the order in which a model gets them that reads whole ones. Of each the windows are those that
  evaluate it, in an order drawn anew every time: all of them, or as many as a step has for each document.

  Raises:
    ConfigError: the documents or the batch cannot be shared out equally, or the source has weights.
  """

  def __init__(self, source: Source, config: Config, documents: int):
    require(not isinstance(source, Mixture), "--documents_per_step does not draw from data with train_weights")
    super().__init__(source, config.model.context, config.seed, "whole", config.model.num_latents)
    lengths, batch_size = np.unique(source.lengths), config.batch_size
    require(len(lengths) == 1, "--documents_per_step is for documents that are equally long, such as images")
    self._places = [Place(0, w.start, w.length) for w in windows_of(int(lengths[0]), config.model)]
    self._of_each = batch_size // documents
    require(
      batch_size == documents * self._of_each and 1 <= self._of_each <= len(self._places),
      f"--documents_per_step={documents} does not share out a batch_size of {batch_size}: each document has "
      f"{len(self._places)} windows",
    )
    self._whole = open_windows(source, context=int(lengths[0]), seed=config.seed, documents="whole")

  def place_of(self, draw: int) -> Place:
    """Returns the window that is draw number `draw` >= 0."""
    visit, number = divmod(draw, self._of_each)
    order = np.random.default_rng((self.seed, visit)).permutation(len(self._places))
    assert isinstance(self._whole, Windows)  # a single source has no others
    return self._places[order[number]]._replace(document=self._whole.place_of(visit).document)


def windows_for(source: Source, config: Config, documents_per_step: int) -> AnyWindows:
  """Opens the training windows: as train.py does, or those of a few documents a step."""
  if documents_per_step:
    return FewDocuments(source, config, documents_per_step)
  model, documents = config.model, config.data.documents
  return open_windows(source, context=model.context, seed=config.seed, documents=documents, latents=model.num_latents)


def without_cross_patch(config: Config) -> Config:
  """Returns the config of the same model without cross-patch attention; parameters are the same."""
  levels = tuple(dataclasses.replace(level, cross_patch=0) for level in config.model.levels)
  return dataclasses.replace(config, model=config.model.with_levels(levels))


def make_diagnosis(config: Config):
  """Makes the jitted (parameters, x_BT) -> gradient norms of each level, and bits that the first level is worth."""
  graph, _ = abstract_model(config.model)

  @jax.jit
  def diagnose(parameters, x_BT):
    def mean_nats(parameters, x_BT):
      nats, count = sum_of_nats(nnx.merge(graph, parameters), x_BT)
      return nats / count

    def nats_with(x_BT, other_BT):
      model = nnx.merge(graph, parameters)
      logits = finer_levels(model.levels, x_BT, model.first_level(other_BT), None)
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, x_BT.astype(jnp.int32)))

    norms = {}
    for i, level in jax.grad(mean_nats)(parameters, x_BT)["levels"].items():
      norms[f"level{i}"] = optax.tree.norm(level)
      norms[f"level{i}.embedder"] = optax.tree.norm(level["embedder"])
      if "from_parent" in level:
        norms[f"level{i}.from_parent"] = optax.tree.norm(level["from_parent"])
    worse = nats_with(x_BT, jnp.roll(x_BT, 1, axis=0)) - nats_with(x_BT, x_BT)
    return {"gradient_norms": norms, "first_level_bits": worse / jnp.log(2.0)}

  return diagnose


def run(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
  """Trains and evaluates; returns the contents of the row's file."""
  began = time.perf_counter()
  methods = arguments.methods
  for method in methods:  # before the model is trained
    check_method(config.model, method)
  mesh = make_mesh(config.mesh)
  source = open_source(config.data, "train")
  first = round(arguments.switch * config.num_steps)
  state = initial_state(config, mesh)
  step_function = make_train_step(without_cross_patch(config) if first else config)
  diagnose = make_diagnosis(config) if arguments.diagnose else None
  curve: list[tuple[int, float, float]] = []
  diagnoses: list[dict[str, Any]] = []
  waiting: list[dict[str, jax.Array]] = []
  last: list[tuple[float, float]] = []  # nats and bytes of the last LOG_EVERY steps
  per_step = config.bytes_per_step
  windows = windows_for(source, config, arguments.documents_per_step)
  start = measured_from = time.perf_counter()
  stream = draw_batches(
    windows, batch_size=config.batch_size, num_steps=config.num_steps, sharding=batch_sharding(mesh)
  )
  for number, batch in stream:
    if number and number == first:
      step_function = make_train_step(config)
    with jax.set_mesh(mesh):
      state, metrics = step_function(state, batch.x_BT, batch.length_B if config.windows_may_be_short else None)
    waiting.append(metrics)
    done = number + 1
    if done % LOG_EVERY == 0 or done == config.num_steps:
      nats, count, norms = (np.array([float(m[k]) for m in waiting]) for k in ("nats", "bytes", "grad_norm"))
      waiting.clear()
      last = [*last, *zip(nats, count, strict=True)][-LOG_EVERY:]
      curve.append((done, round(float(bits_per_byte(nats.sum(), count.sum())), 5), round(float(norms.mean()), 5)))
      print(f"step {done}/{config.num_steps} bits {curve[-1][1]} {time.perf_counter() - start:.0f} s", flush=True)
      if len(curve) == 1:
        measured_from = time.perf_counter()
    if diagnose and (done % arguments.diagnose == 0 or done == 1):
      found = jax.device_get(diagnose(state.parameters, batch.x_BT[:16]))
      diagnoses.append({"step": done, **jax.tree.map(float, found)})
  seconds = time.perf_counter() - measured_from
  device = jax.devices()[0]
  row = {
    "name": arguments.name,
    "changes": arguments.changes,
    "switch": arguments.switch,
    "documents_per_step": arguments.documents_per_step,
    "train_bpb_of_last_steps": round(float(bits_per_byte(*np.sum(last, axis=0))), 5),
    "train_bytes": config.num_steps * per_step,
    "corpus_bytes": int(source.lengths.sum()),
    "parameters": config.model.parameter_count(),
    "flops_per_byte": flops_per_byte(config.model, training=True),
    "spacebyte_flops_per_byte": flops_per_byte(config.model, attention="whole", training=True),
    "bytes_per_second": (config.num_steps - curve[0][0]) * per_step / seconds if len(curve) > 1 else None,
    "seconds": time.perf_counter() - began,
    "device": f"{jax.device_count()} x {device.device_kind}",
    "shared_device": arguments.shared,
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    "curve": curve,
    "diagnoses": diagnoses,
    "config": config.to_dict(),
  }
  if arguments.save:
    export_model(arguments.save, config, state.parameters, config.num_steps)
  validation, limit = open_source(config.data, "validation"), arguments.validation_bytes
  found = {m: evaluate(config, state.parameters, validation, mesh=mesh, method=m, max_bytes=limit) for m in methods}
  by_method = {method: round(result.bpb, 5) for method, result in found.items()}
  scored = {"validation_bpb": by_method[methods[0]], "validation_bytes": found[methods[0]].bytes}
  return {**scored, "bpb_by_method": by_method, **row}


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("name")
  parser.add_argument("--set", dest="changes", nargs="+", default=[], metavar="KEY=VALUE")
  parser.add_argument("--train", required=True)
  parser.add_argument("--validation", required=True)
  parser.add_argument(
    "--methods", nargs="+", choices=METHODS, default=["basic"], help="of scoring the validation data; the first counts"
  )
  parser.add_argument("--validation_bytes", type=int, default=0, help="score only so many; 0 scores all")
  budget = parser.add_mutually_exclusive_group(required=True)
  budget.add_argument("--bytes", type=float)
  budget.add_argument("--flops", type=float)
  parser.add_argument("--warmup", type=float, default=0.04, help="share of the steps")
  parser.add_argument("--switch", type=float, default=0.0, help="share of the steps without cross-patch attention")
  parser.add_argument("--diagnose", type=int, default=0, help="every so many steps")
  parser.add_argument(
    "--documents_per_step", type=int, default=0, help="which all windows of a step are of; 0 draws each on its own"
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--shared", action="store_true", help="note that another run shares the device")
  parser.add_argument("--save", default="", help="a folder for the parameters")
  parser.add_argument("--output", type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  config = make_config(arguments)
  if (arguments.switch or arguments.diagnose) and not isinstance(config.model, MegabyteConfig):
    parser.error("--switch and --diagnose are for MEGABYTE")
  row = run(config, arguments)
  arguments.output.parent.mkdir(parents=True, exist_ok=True)
  with replacing(arguments.output) as path:
    path.write_text(json.dumps(row) + "\n")
  print(f"{arguments.name} {' '.join(arguments.changes)}: {row['validation_bpb']} bits per byte", flush=True)


if __name__ == "__main__":
  command_line.run(main)
