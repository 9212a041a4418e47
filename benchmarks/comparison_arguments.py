"""Reads the command line of comparisons.py, whose head describes the flags."""

from __future__ import annotations

import argparse
import pathlib

from comparison_rows import COMPARISONS

from megabyte_jax.commands.arguments import Parser

ROOT = pathlib.Path(__file__).resolve().parent.parent


def count(text: str) -> int:
  """Parses a whole number, also one such as 1e8."""
  return int(float(text))


def numbers(text: str) -> list[float]:
  """Parses numbers separated by commas."""
  return [float(number) for number in text.split(",")]


def parse_arguments(description: str | None) -> argparse.Namespace:
  """Parses the command line; `description` is for --help."""
  parser = Parser("python benchmarks/comparisons.py", description=description)
  parser.add_argument("comparison", choices=list(COMPARISONS))
  parser.add_argument("--data", default="corpora", help="the folder that benchmarks/corpora/build.py made")
  parser.add_argument("--workdir", default="runs/comparisons")
  parser.add_argument("--output", default="", help="results are written here; default: WORKDIR/COMPARISON/results.json")
  parser.add_argument("--train-bytes", type=count, default=2**27, help="of every row, such as 1e8")
  parser.add_argument("--rates", type=numbers, default="1,3,6", help="times the paper's learning rate")
  parser.add_argument("--like", default="", help="match and choose nothing: take it from this folder of rows' files")
  parser.add_argument("--trial-share", type=float, default=0.2, help="of the bytes, for each learning rate")
  parser.add_argument("--trial-bytes", type=count, default=2**20, help="of the validation split, to compare rates on")
  parser.add_argument("--test-bytes", type=count, default=0, help="score only the first so many of the test split")
  parser.add_argument("--rows", default="", help="some of the rows, by a regular expression; default: all")
  parser.add_argument("--flags", default="", help="more flags of train.py for all rows, separated by spaces")
  parser.add_argument("--match", default="time", choices=["time", "flops", "none"], help="what rows are made equal in")
  parser.add_argument("--match-rounds", type=int, default=10, help="how often each candidate is timed, one second each")
  parser.add_argument("--dry-run", action="store_true", help="show what would be trained, matched by FLOPs, and end")
  parser.add_argument("--match-only", action="store_true", help="end when rows are matched, before any is trained")
  parser.add_argument("--compiled", default="", help="folder of compiled programs; default: WORKDIR/compiled")
  parser.add_argument("--config-file", default=str(ROOT / "configs/small.py"), help="what makes configs of rows")
  args = parser.parse_args()
  folder = pathlib.Path(args.workdir).resolve() / args.comparison
  args.output = pathlib.Path(args.output or folder / "results.json")
  if args.output.suffix != ".json":
    parser.error(
      f"--output={args.output} must end in .json: files of the rows go into a folder of the same name without it"
    )
  args.data = pathlib.Path(args.data).resolve() / COMPARISONS[args.comparison].data
  args.config_file = pathlib.Path(args.config_file).resolve()
  return args
