"""The paper's tables: sizes, FLOPs, the paper's numbers and ours.

  python -m megabyte_jax.tables                      # all of them
  python -m megabyte_jax.tables 5 --format=markdown  # one: 1 to 17 or audio
  python -m megabyte_jax.tables 2 --runs=runs        # with the numbers of your own runs
  python -m megabyte_jax.tables figure3 --plot=figure3.png

Columns: parameters as the paper names them (a GPT-3 size x layers / its layers) and as they are; forward and
backward FLOPs per predicted byte, causal attention (see flops.py); context in bytes; the paper's results and
ours, with where ours came from. Our runs are far smaller unless their source says otherwise.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from megabyte_jax.errors import require
from megabyte_jax.files.outputs import check_output_file
from megabyte_jax.models import flops
from megabyte_jax.paper import measured
from megabyte_jax.paper.configs import ROOT, all_rows
from megabyte_jax.paper.printed_numbers import REPEATED, TABLES
from megabyte_jax.paper.tables import FIGURE_3, RESULTS, _order, render


def define_flags() -> None:
  """Those of this command."""
  flags.DEFINE_enum("format", "text", ["text", "markdown", "json"], "how to print")
  flags.DEFINE_string("runs", "", "folder with run directories of train.py, evaluated by eval.py")
  flags.DEFINE_string("plot", "", f"{FIGURE_3}: also draw it into this PNG file")


def main(argv: Sequence[str]) -> None:
  """Prints the tables named on the command line."""
  options = flags.FLAGS
  names = [name.lower().removeprefix("table") for name in argv[1:]] or sorted([*TABLES, *REPEATED], key=_order)
  require(not options.plot or names == [FIGURE_3], f"--plot goes with {FIGURE_3} only")
  if options.plot:
    check_output_file("--plot", options.plot)
  found = measured.from_results(RESULTS, ROOT)
  if options.runs:
    runs = measured.from_runs(pathlib.Path(options.runs), all_rows())
    found += runs
    if not runs:
      print(f"--runs={options.runs} holds no run of a row, scored by eval.py with the row's method", file=sys.stderr)
  print(render(names, options.format, found))
  if options.plot:
    from megabyte_jax.display import plots  # noqa: PLC0415 - matplotlib is slow to import

    plots.flops_per_byte(flops.figure3_curves(), options.plot)


if __name__ == "__main__":
  from megabyte_jax.commands import command_line

  define_flags()
  command_line.run_with_flags(main)
