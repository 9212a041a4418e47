"""The paper's comparisons at small scale: trains and evaluates rows of its tables at equal measured compute.

  python benchmarks/corpora/build.py corpora
  python benchmarks/comparisons.py books --data=corpora --workdir=runs/comparisons --output=docs/results/books.json

Every row is the paper's, made smaller by the one rule of configs/small.py. Then, for each row:

1. Rows below the first get the number of layers at which a training step takes the first row's time per byte on this
   machine (megabyte_jax.matching, as in section 4.1 of the paper), or its FLOPs (--match=flops).
2. Learning rates of --rates times the paper's are tried for --trial_share of the bytes; the best by validation wins.
3. It trains for --train_bytes (equal for all rows), and is evaluated by the row's methods on the test split.

What is done is kept in the work directory; the same command goes on from there. The results hold bits per byte, the
command, the device, layers, learning rates and seconds; `python -m megabyte_jax.tables` shows them beside the paper's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax

from megabyte_jax import flops, matching, windows
from megabyte_jax.atomic_file import replacing
from megabyte_jax.config import Config, ConfigError
from megabyte_jax.tables import config_of

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Rows that are compared.

  Attributes:
    data: the folder of the corpus, with train, validation and test.
    rows: TABLE:ROW; the first is the reference, whose cost the others are given.
    methods: by which each row is evaluated besides its own, if they fit its model.
    flags: of train.py, for all rows.
    words: whether word-level perplexity is wanted.
  """

  data: str
  rows: tuple[str, ...]
  methods: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  words: bool = False


def text_rows(name: str) -> tuple[str, ...]:
  return tuple(
    f"table2:{name}_{model}" for model in ("megabyte", "transformer", "windowed_transformer", "perceiver_ar")
  )


def image_rows(name: str) -> tuple[str, ...]:
  return tuple(f"table5:{name}_{model}" for model in ("megabyte", "transformer", "perceiver_ar"))


COMPARISONS = {
  "books": Comparison("books", text_rows("books"), methods=("basic", "sliding", "strided", "both"), words=True),
  "code": Comparison("code", text_rows("code")),
  "latex": Comparison("latex", text_rows("arxiv")),
  "image64": Comparison("photos", image_rows("image64"), flags=("--config.data.image_tiles=64",)),
  "image256": Comparison("photos", image_rows("image256")),
  "image640": Comparison("photos", image_rows("image640")),
  "scans": Comparison(
    "photos",
    tuple(f"table16:{m}_{s}_scan" for m in ("megabyte", "perceiver_ar") for s in ("patch", "raster")),
  ),
  "audio": Comparison("audio", ("table10:audio_megabyte",)),
  "ablations": Comparison(
    "latex",
    tuple(
      f"table10:arxiv_{m}" for m in ("megabyte", "without_local", "without_global", "without_cross_patch", "with_cnn")
    ),
  ),
  "patch_sizes": Comparison("photos", tuple(f"table12:patch{size}" for size in (192, 48, 768))),
  "shares": Comparison(
    "books",
    tuple(f"table13:{row}" for row in ("global760m_local262m", "global350m_local290m", "global1300m_local218m")),
  ),
}


@dataclasses.dataclass
class Run:
  """One row on its way: its flags of train.py, and the folder where everything of it lies."""

  row: str
  config_file: pathlib.Path
  folder: pathlib.Path
  flags: list[str]

  def config(self) -> Config:
    """Without the flags."""
    return config_in(self.config_file, self.row)

  def train(self, workdir: pathlib.Path, *more: str) -> None:
    """Trains to the end, from where it stopped."""
    call("train.py", f"--config={self.config_file}:{self.row}", f"--workdir={workdir}", *self.flags, *more)

  def evaluate(self, workdir: pathlib.Path, *more: str) -> dict:
    """The JSON object that eval.py prints."""
    return json.loads(call("eval.py", f"--workdir={workdir}", "--no-compressors", *more).splitlines()[-1])


def call(script: str, *arguments: str) -> str:
  """Runs one of the project's scripts, showing what it prints."""
  lines = []
  print("$ python", script, *arguments, flush=True)
  with subprocess.Popen(
    [sys.executable, str(ROOT / script), *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout:
      print(line, end="", flush=True)
      lines.append(line)
  if process.returncode:
    raise SystemExit(f"{script} failed with exit code {process.returncode}; mend that and give the same command again")
  return "".join(lines)


def config_in(file: pathlib.Path, row: str) -> Config:
  """What a config file such as configs/small.py makes of a row."""
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return Config.from_dict(module.get_config(row))


def once(path: pathlib.Path, make) -> dict:
  """What `make` returned when it was first called, kept in `path`."""
  if not path.exists():
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(str(path)) as temporary:
      temporary.write_text(json.dumps(value, indent=1) + "\n")
  return json.loads(path.read_text())


def matched_layers(row: Config, reference: Config, by: str) -> dict:
  """The flag that gives `row` the reference's time or FLOPs per byte, and what it costs then."""
  found = matching.match(row, matching.cost_against(reference, by))
  return {"flag": found.override, "layers": found.layers, "cost": found.ratio, "by": by}


def complete(run: Run, comparison: Comparison, args: argparse.Namespace) -> dict:
  """One row, from its learning rates to its results."""
  config = run.config()
  per_step = config.batch_size * flops.predicted_bytes(config.model)
  steps = max(2, round(args.train_bytes / per_step))
  trial_steps = max(2, round(steps * args.trial_share))
  paper_rate = config_of(run.row).optimizer.learning_rate
  trials = {}
  for factor in args.rates if len(args.rates) > 1 else ():
    workdir = run.folder / f"rate{factor:g}"

    def one_trial(factor=factor, workdir=workdir):
      run.train(workdir, *schedule(paper_rate * factor, trial_steps))
      return run.evaluate(workdir, "--split=validation", f"--max-bytes={2**20}")

    trials[factor] = once(run.folder / f"rate{factor:g}.json", one_trial)["bpb"]
  best = min(trials, key=trials.get) if trials else args.rates[0]
  workdir = run.folder / "run"
  result = {"row": run.row, "learning_rate": paper_rate * best, "trials": trials, "bytes_trained": steps * per_step}

  def whole_run():
    run.train(workdir, *schedule(paper_rate * best, steps))
    methods = dict.fromkeys((config.eval.method, *(m for m in comparison.methods if fits(config, m))))
    words = ("--words=count",) if comparison.words else ()
    return {method: run.evaluate(workdir, "--split=test", f"--method={method}", *words) for method in methods}

  evaluations = once(run.folder / "evaluations.json", whole_run)
  return result | evaluations[config.eval.method] | {"methods": {m: e["bpb"] for m, e in evaluations.items()}}


def fits(config: Config, method: str) -> bool:
  """Whether an inference method suits the model."""
  try:
    windows.check_method(config.model, method)
  except ConfigError:
    return False
  return True


def schedule(rate: float, steps: int) -> tuple[str, ...]:
  """Flags of train.py."""
  warmup = max(1, steps // 10)
  return (
    f"--config.optimizer.learning_rate={rate}",
    f"--config.optimizer.warmup_steps={warmup}",
    f"--config.num_steps={steps}",
    f"--config.eval.every_steps={max(1, steps // 8)}",
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("comparison", choices=list(COMPARISONS))
  parser.add_argument("--data", default="corpora", help="the folder that benchmarks/corpora/build.py made")
  parser.add_argument("--workdir", default="runs/comparisons")
  parser.add_argument("--output", default="", help="results are written here; default: WORKDIR/COMPARISON/results.json")
  parser.add_argument("--train_bytes", type=int, default=2**27, help="of every row")
  parser.add_argument("--rates", default="1,3,6", help="times the paper's learning rate")
  parser.add_argument("--trial_share", type=float, default=0.1, help="of the bytes, for each learning rate")
  parser.add_argument("--rows", default="", help="some of the rows, by a regular expression; default: all")
  parser.add_argument("--flags", default="", help="more flags of train.py for all rows, separated by spaces")
  parser.add_argument("--match", default="time", choices=["time", "flops", "none"], help="what rows are made equal in")
  parser.add_argument("--config_file", default=str(ROOT / "configs/small.py"), help="what makes configs of rows")
  args = parser.parse_args()
  args.rates = [float(rate) for rate in args.rates.split(",")]
  comparison = COMPARISONS[args.comparison]
  folder = pathlib.Path(args.workdir).resolve() / args.comparison
  data = pathlib.Path(args.data).resolve() / comparison.data
  for split in ("train", "validation", "test"):
    if not (data / split).is_dir():
      raise SystemExit(f"{data / split} does not exist; make it with: python benchmarks/corpora/build.py {args.data}")
  shared = [f"--config.data.{split}={data / split}" for split in ("train", "validation", "test")]
  shared += [*comparison.flags, *args.flags.split()]
  rows = []
  for row in comparison.rows:
    if not re.search(args.rows, row):
      continue
    run = Run(row, pathlib.Path(args.config_file).resolve(), folder / row.replace(":", "."), list(shared))
    if args.match != "none" and row != comparison.rows[0]:
      configs = run.config(), config_in(run.config_file, comparison.rows[0])
      match = once(run.folder / "match.json", lambda configs=configs: matched_layers(*configs, args.match))
      run.flags.append(match["flag"])
    rows.append(complete(run, comparison, args))
    print_results(rows)
  device = jax.devices()[0].device_kind
  note = f"{pathlib.Path(args.config_file).name}, {args.train_bytes / 1e6:.0f} MB of {comparison.data}, {device}"
  results = {
    "command": "python " + " ".join(sys.argv),
    "versions": {"jax": jax.__version__},
    "device": device,
    "rows": [row | {"note": note} for row in rows],
  }
  output = pathlib.Path(args.output or folder / "results.json")
  output.parent.mkdir(parents=True, exist_ok=True)
  with replacing(str(output)) as temporary:
    temporary.write_text(json.dumps(results, indent=1) + "\n")
  print(f"results: {output}")


def print_results(rows: list[dict]) -> None:
  """What is known so far."""
  print(f"{'row':<36}{'bpb':>8}{'learning rate':>16}  methods")
  for row in rows:
    methods = ", ".join(f"{name} {bpb:.4f}" for name, bpb in row["methods"].items())
    print(f"{row['row']:<36}{row['bpb']:>8.4f}{row['learning_rate']:>16.2g}  {methods}", flush=True)


if __name__ == "__main__":
  main()
