"""Trains and evaluates rows of the paper's tables, and recipes, at small scale and equal measured compute.

  python benchmarks/corpora/build.py corpora
  python benchmarks/comparisons.py books --data=corpora --workdir=runs/comparisons --output=docs/results/books.json
  python benchmarks/comparisons.py books --data=corpora --dry_run       what it would train, and on how many bytes

Every row is the paper's, made smaller by the one rule of configs/small.py; `modern_books` and `modern_images` change
the paper's recipe as megabyte_jax/paper/recipe.py says, all at once and all but one. Then, for each row:

1. Rows below the first get the number of layers at which a training step takes the first row's time per byte on this
   machine (`megabyte_jax matching`, as in section 4.1 of the paper), or its FLOPs (--match=flops). Recipes keep their
   layers: they get as many bytes as take the first row's time.
2. Learning rates of --rates times the paper's are tried for --trial_share of the bytes; the best on --trial_bytes of
   the validation split wins. A rate at which the numbers break down is out. Where the best is the first or last of the
   rates, more of them should be tried: what was tried already stays. With --like=docs/results/books layers and
   learning rates are those that were found there: for a second seed (--flags=--config.seed=1), or for more bytes.
3. It trains for --train_bytes (equal for all rows, but for recipes), and is evaluated by the row's methods on the test
   split, or on its first --test_bytes.

All is done in one process, by the functions behind the commands that are printed. What is done of a row is kept in a
file of its own beside the results (comparison_files.py); the same command goes on from there, also on another machine.
The results hold bits per byte, the command, the device, what was matched, learning rates and seconds; `python -m
megabyte_jax tables` shows them beside the paper's. Beside them are pictures of learning curves and losses by position.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import pathlib
import re
import shlex
import shutil
import sys

import comparison_files
import jax
from comparison_arguments import ROOT, parse_arguments
from comparison_rows import COMPARISONS, Comparison

from megabyte_jax.commands import command_line
from megabyte_jax.config import Config, overrides
from megabyte_jax.data.open_data import open_source
from megabyte_jax.display.progress import human
from megabyte_jax.errors import ConfigError, require
from megabyte_jax.evaluation import windows
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models import flops
from megabyte_jax.planning import matching

sys.path.insert(0, str(ROOT))

import eval as evaluation
import train

# Arguments that decide a row's results, together with its config.
DECISIVE = ("train_bytes", "trial_share", "trial_bytes", "test_bytes", "match")


@dataclasses.dataclass
class Run:
  """One row on its way.

  Attributes:
    row: its name.
    config_file: what makes its config.
    folder: where everything of it lies.
    flags: of train.py.
    file: what is known of the row so far.
    cost: of a byte, relative to the reference's, with these flags.
    matched: what was done to make the costs equal.
  """

  row: str
  config_file: pathlib.Path
  folder: pathlib.Path
  flags: list[str]
  file: comparison_files.RowFile
  cost: float = 1.0
  matched: dict | None = None

  def config(self, *more: str) -> Config:
    """Returns the row's config with the comparison's flags, and some more."""
    return config_in(self.config_file, self.row, [*self.flags, *more])

  def steps(self, train_bytes: float) -> tuple[int, int]:
    """Returns the training steps for about `train_bytes` bytes, and the bytes that these predict."""
    config = self.config()
    per_step = config.bytes_per_step
    steps = max(2, round(train_bytes / per_step))
    return steps, steps * per_step

  def train(self, workdir: pathlib.Path, *more: str) -> None:
    """Trains to the end, from where it stopped; what train.py would do.

    Raises:
      FloatingPointError: the numbers broke down.
      SystemExit: a signal stopped it.
    """
    flags = [*self.flags, *more]
    command = ["python", "train.py", f"--config={self.config_file}:{self.row}", f"--workdir={workdir}", *flags]
    print("$", shlex.join(command), flush=True)
    config = self.config(*more)
    if not train.train(config, str(workdir)):
      raise SystemExit("stopped; give the same command again")

  def evaluate(self, workdir: pathlib.Path, *more: str) -> dict:
    """Runs eval.py and returns the JSON object that it prints."""
    arguments = [f"--workdir={workdir}", "--no-compressors", *more]
    print("$ python eval.py", *arguments, flush=True)
    return json.loads(evaluation.main(arguments))


def config_in(file: pathlib.Path, row: str, flags: list[str]) -> Config:
  """Returns the config that train.py makes of a config file such as configs/small.py, a row and flags."""
  last = {flag.partition("=")[0]: flag for flag in flags}  # a later one replaces an earlier one
  _, changes = overrides.split(list(last.values()), ["config"])
  return Config.from_dict(overrides.load("--config", f"{file}:{row}", changes["config"]))


def match(run: Run, comparison: Comparison, cost: matching.Cost) -> dict:
  """Finds what gives a row the reference's cost, and the cost of a byte then."""
  if comparison.vary == "bytes":
    return {"flag": "", "cost": cost(run.config())}
  found = matching.match(run.config(), cost)
  return {"flag": found.override, "layers": found.layers, "cost": found.ratio}


def match_all(runs: list[Run], comparison: Comparison, args: argparse.Namespace) -> None:
  """Makes the costs of all rows equal to the reference's, before anything is trained."""
  reference = config_in(runs[0].config_file, comparison.rows[0], runs[0].flags)
  by = "flops" if args.dry_run and args.match == "time" else args.match
  cost = functools.cache(lambda: matching.cost_against(reference, by, args.match_rounds))  # by time, it takes memory
  for run in runs:
    if by == "none" or run.row == comparison.rows[0]:
      continue

    def found(run=run):
      return taken(run, args.like)["matched"] if args.like else match(run, comparison, cost()) | {"by": by}

    run.matched = found() if args.dry_run else run.file.get_or_make("matched", found)
    run.cost = run.matched["cost"] if comparison.vary == "bytes" else 1.0
    run.flags += [run.matched["flag"]] if run.matched["flag"] else []


def taken(run: Run, folder: str) -> dict:
  """Reads what was matched and chosen for the row in an earlier comparison, whose rows' files lie in `folder`.

  Raises:
    ConfigError: the folder has no file of the row, or its training is not finished.
  """
  path = pathlib.Path(folder) / run.file.path.name
  content = json.loads(path.read_text()) if path.exists() else {}
  require(
    "run" in content, f"--like={folder} has no finished {path.name}; name the folder of another comparison's rows"
  )
  return {"matched": content.get("matched"), "learning_rate": content["run"]["learning_rate"]}


def try_rates(run: Run, args: argparse.Namespace, steps: int) -> tuple[float, dict[float, float | None], bool]:
  """Returns the best learning rate, bits per byte by factor of the paper's, and whether the best is at an edge."""
  paper_rate = run.config().optimizer.learning_rate
  if args.like:
    return taken(run, args.like)["learning_rate"], {}, False
  if len(args.rates) == 1:
    return paper_rate * args.rates[0], {}, False
  trials = {}
  for factor in args.rates:
    workdir = run.folder / f"rate{factor:g}"

    def one_trial(factor=factor, workdir=workdir):
      try:
        run.train(workdir, *schedule(run.config(), paper_rate * factor, max(2, round(steps * args.trial_share))))
      except FloatingPointError as error:
        print(f"learning rate {paper_rate * factor:g} is out: {error}", flush=True)
        return {"bpb": None, "error": str(error)}
      result = run.evaluate(workdir, f"--data={args.data / 'validation'}", f"--max-bytes={args.trial_bytes}")
      shutil.rmtree(workdir / "checkpoints")  # gigabytes
      return {name: result[name] for name in ("bpb", "bytes", "step")}

    trials[factor] = run.file.get_or_make(f"trial of {factor:g} times the paper's learning rate", one_trial)["bpb"]
  finite = {factor: bpb for factor, bpb in trials.items() if bpb is not None}
  if not finite:
    raise SystemExit(f"{run.row} broke down at every learning rate; give smaller --rates")
  best = min(finite, key=finite.__getitem__)
  return paper_rate * best, trials, len(finite) > 1 and best in (min(args.rates), max(args.rates))


def complete(run: Run, comparison: Comparison, args: argparse.Namespace) -> tuple[dict, dict]:
  """Takes one row from its learning rates to its results; returns these and what is kept of its run."""
  config = run.config()
  steps, bytes_trained = run.steps(args.train_bytes / run.cost)
  rate, trials, at_edge = try_rates(run, args, steps)
  workdir = run.folder / "run"
  result = {
    "row": run.row,
    "learning_rate": rate,
    "trials": trials,
    "best_rate_is_the_last_tried": at_edge,
    "bytes_trained": bytes_trained,
    "parameters": config.model.parameter_count(),
    "training_flops": bytes_trained * flops.flops_per_byte(config.model, training=True),
    "matched": run.matched,
  }

  def whole_run():
    run.train(workdir, *schedule(config, rate, steps))
    methods = dict.fromkeys((config.eval.method, *(m for m in comparison.methods if fits(config, m))))
    limit = (f"--max-bytes={args.test_bytes}",) if args.test_bytes else ()
    words = ("--words=count",) if comparison.words and not limit else ()
    done = {}
    for method in methods:
      done[method] = run.evaluate(workdir, "--split=test", f"--method={method}", *words, *limit)
      done[method]["positions"] = json.loads((workdir / "eval_positions.json").read_text())
    where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "date": f"{datetime.date.today()}"}
    where |= {"training_seconds": comparison_files.training_seconds(workdir), "learning_rate": rate}
    return comparison_files.row_record(workdir, done) | where

  kept = run.file.get_or_make("run", whole_run)
  if kept["learning_rate"] != rate:
    raise SystemExit(
      f"{run.file.path}: the row was trained at {kept['learning_rate']:g}, but {rate:g} is the best of "
      "these --rates; remove its entry 'run' to train it again"
    )
  methods = {method: found["bpb"] for method, found in kept["results"].items()}
  result |= {name: kept[name] for name in ("training_seconds", "device", "jax", "date")} | {"methods": methods}
  return result | kept["results"][kept["method"]], kept


def fits(config: Config, method: str) -> bool:
  """Tells whether an inference method suits the model."""
  try:
    windows.check_method(config.model, method)
  except ConfigError:
    return False
  return True


def schedule(config: Config, rate: float, steps: int) -> tuple[str, ...]:
  """Returns the flags of train.py for another number of steps, with the config's share of them to warm up."""
  warmup = max(1, round(steps * config.optimizer.warmup_steps / config.num_steps))
  return (
    f"--config.optimizer.learning_rate={rate}",
    f"--config.optimizer.warmup_steps={warmup}",
    f"--config.num_steps={steps}",
    "--config.data.validation=",  # scored by eval.py where it is needed
    "--config.checkpoint.every_steps=0",
    "--config.checkpoint.every_minutes=5.0",
    "--config.checkpoint.keep=1",
  )


def begin(comparison: Comparison, args: argparse.Namespace) -> list[Run]:
  """Returns the wanted rows, with what is known of them."""
  flags = [*comparison.flags, *args.flags.split()]
  for split in ("train", "validation", "test"):
    if not (args.data / split).is_dir():
      where = args.data.parent
      raise SystemExit(f"{args.data / split} does not exist; make it with: python benchmarks/corpora/build.py {where}")
    flags.append(f"--config.data.{split}={args.data / split}")
  runs = []
  for row in comparison.rows:
    if re.search(args.rows, row):
      config = comparison_files.without_places(config_in(args.config_file, row, flags).to_dict())
      settings = {name: getattr(args, name) for name in DECISIVE} | {"config": config}
      place = row.replace(":", ".")
      file = comparison_files.RowFile(args.output.with_suffix("") / f"{place}.json", settings)
      folder = pathlib.Path(args.workdir).resolve() / args.comparison / place
      runs.append(Run(row, args.config_file, folder, list(flags), file))
  if not runs:
    raise SystemExit(f"--rows={args.rows} is none of {', '.join(comparison.rows)}")
  return runs


def main() -> None:
  args = parse_arguments(__doc__)
  comparison = COMPARISONS[args.comparison]
  compiled = args.compiled or pathlib.Path(args.workdir).resolve() / "compiled"
  jax.config.update("jax_compilation_cache_dir", str(compiled))
  runs = begin(comparison, args)
  match_all(runs, comparison, args)
  if args.dry_run:
    return print_plan(runs, args)
  if args.match_only:
    return print("\n".join(f"{run.row}: {run.matched}" for run in runs))
  rows, kept = [], {}
  for run in runs:
    row, kept[run.row] = complete(run, comparison, args)
    rows.append(row)
    print_results(rows)
  write_results(rows, comparison, args)
  comparison_files.draw(args.output, kept)
  print(f"results: {args.output}, and beside and in {args.output.with_suffix('')} pictures of all rows and their files")


def write_results(rows: list[dict], comparison: Comparison, args: argparse.Namespace) -> None:
  """Writes the results file (see megabyte_jax/paper/measured.py)."""
  note = f"{args.config_file.name}, {args.train_bytes / 1e6:.3g} MB of {comparison.data}"
  if args.test_bytes:
    note += f", first {args.test_bytes / 1e6:g} MB of test"
  note += "".join(f", {flag}" for flag in args.flags.split() if not flag.startswith("--config.seed="))
  results = {
    "command": "python " + " ".join(sys.argv),
    "rows": [row | {"note": f"{note}, {row['device']}"} for row in rows],
  }
  args.output.parent.mkdir(parents=True, exist_ok=True)
  with replacing(str(args.output)) as temporary:
    temporary.write_text(json.dumps(results, indent=1) + "\n")


def print_plan(runs: list[Run], args: argparse.Namespace) -> None:
  """Prints what each row would train: FLOPs and bytes with the trials of learning rates, epochs of the last run."""
  print(f"{'row':<44}{'layers':>8}{'parameters':>12}{'FLOP/byte':>11}{'bytes':>9}{'epochs':>8}{'steps':>8}{'FLOPs':>9}")
  total = 0.0
  for run in runs:
    config = run.config()
    layers = matching.layers_text(config)
    steps, length = run.steps(args.train_bytes / run.cost)
    trials = args.trial_share * len(args.rates) if len(args.rates) > 1 else 0.0
    per_byte = flops.flops_per_byte(config.model, training=True)
    cost = per_byte * length * (1 + trials)
    total += cost
    epochs = length / int(open_source(config.data, "train").lengths.sum())
    print(
      f"{run.row:<44}{layers:>8}{human(config.model.parameter_count()):>12}{human(per_byte):>11}"
      f"{human(length):>9}{epochs:>8.1f}{steps:>8}{cost:>9.1e}"
    )
  print(f"{total:.1e} FLOPs in all: {total / 1e14 / 60:.0f} minutes at 100 TFLOP/s")


def print_results(rows: list[dict]) -> None:
  """Prints what is known so far."""
  print(f"{'row':<44}{'bpb':>8}{'cost':>8}{'learning rate':>16}  methods")
  for row in rows:
    methods = ", ".join(f"{name} {bpb:.4f}" for name, bpb in row["methods"].items())
    rate = f"{row['learning_rate']:.2g}{' (edge)' if row['best_rate_is_the_last_tried'] else ''}"
    cost = row["matched"]["cost"] if row["matched"] else 1.0  # of a byte, before recipes get fewer bytes for it
    print(f"{row['row']:<44}{row['bpb']:>8.4f}{cost:>8.1%}{rate:>16}  {methods}", flush=True)


if __name__ == "__main__":
  command_line.run(main)
