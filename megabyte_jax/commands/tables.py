"""Prints the paper's tables: sizes, FLOPs, the paper's numbers and ours.

  python -m megabyte_jax tables                      # all of them
  python -m megabyte_jax tables 5 --format=markdown  # one: 1 to 17 or audio
  python -m megabyte_jax tables 2 --runs=runs        # with the numbers of your own runs
  python -m megabyte_jax tables figure3 --plot=figure3.png

Columns: parameters as the paper names them (a GPT-3 size x layers / its layers) and as they are; forward and
backward FLOPs per predicted byte, causal attention (see flops.py); context in bytes; the paper's results and
ours, with where ours came from. Our runs are far smaller unless their source says otherwise.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import command_line
from megabyte_jax.errors import require
from megabyte_jax.files.outputs import check_output_file
from megabyte_jax.paper.printed_numbers import FIGURE_3, table_names


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own).

  Raises:
    ConfigError: --plot goes without Figure 3, or no file can be written there.
  """
  parser = flags.Parser(flags.called("tables"), description=__doc__)
  parser.add_argument("names", nargs="*", metavar="TABLE", help=f"1 to 17, audio or {FIGURE_3}; default: all tables")
  parser.add_argument("--format", default="text", choices=["text", "markdown", "json"], help="how to print")
  parser.add_argument(
    "--runs", type=flags.path, default="", help="folder with finished runs of train.py, or others scored by eval.py"
  )
  parser.add_argument("--plot", type=flags.path, default="", help=f"{FIGURE_3}: also draw it into this PNG file")
  args = parser.parse_args(arguments)
  args.names = [name.lower().removeprefix("table") for name in args.names]
  require(not args.plot or args.names == [FIGURE_3], f"--plot goes with {FIGURE_3} only")
  if args.plot:
    check_output_file("--plot", args.plot)
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the tables named on the command line."""
  args = parse_arguments(arguments)
  from megabyte_jax.models import flops
  from megabyte_jax.paper import measured
  from megabyte_jax.paper.rows_by_name import ROOT, all_rows
  from megabyte_jax.paper.tables import RESULTS, render

  names = args.names or table_names()
  found = measured.from_results(RESULTS, ROOT)
  if args.runs:
    runs = measured.from_runs(pathlib.Path(args.runs), all_rows())
    found += runs
    if not runs:
      hint = (
        "run eval.py --workdir=RUN without --data, so that a whole split is scored; a smaller model's run is known "
        "by its folder, such as runs/table5/image64_megabyte"
      )
      print(
        f"--runs={args.runs} holds no run of a row, scored by eval.py with the row's method; {hint}", file=sys.stderr
      )
  print(render(names, args.format, found))
  if args.plot:
    from megabyte_jax.display import plots

    plots.flops_per_byte(flops.figure3_curves(), args.plot)


if __name__ == "__main__":
  command_line.run(main)
