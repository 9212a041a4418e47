"""Matches compute: finds the layers that give a candidate a reference's cost (section 4.1, appendix A.2).

  python -m megabyte_jax matching --reference=configs/paper/table2.py:pg19_megabyte \\
    --candidate=configs/paper/table2.py:pg19_transformer

prints the candidate's layers at which the costs per predicted byte agree best, and the flag that sets them.

  --by=flops  analytic training FLOPs (causal attention; instant)
  --by=time   measured seconds of the training step, on the devices at hand, as the paper did: reference and candidate
              in turns, so that both are in memory at once. Reduce the batches with --reference.batch_size and
              --candidate.batch_size where the configs' own do not fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import command_line
from megabyte_jax.config import Config
from megabyte_jax.errors import require


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own) and the configs that it names."""
  parser = flags.Parser(flags.called("matching"), description=__doc__)
  parser.add_config("reference", "config whose cost is to be matched")
  parser.add_config("candidate", "config whose layers are solved for")
  parser.add_argument("--by", default="flops", choices=["flops", "time"], help="analytic FLOPs or measured time")
  parser.add_argument(
    "--level", type=int, default=-1, help="level of the candidate whose layers vary, from 0; -1 is the finest"
  )
  parser.add_argument("--rounds", type=int, default=10, help="with --by=time, how often both are timed for each count")
  args = parser.parse_args(arguments)
  require(args.rounds >= 1, f"--rounds is {args.rounds}; it must be at least 1")
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the solution."""
  args = parse_arguments(arguments)
  from megabyte_jax.planning.matching import cost_against, match, report

  reference, candidate = Config.from_dict(args.reference), Config.from_dict(args.candidate)
  found = match(candidate, cost_against(reference, args.by, args.rounds), args.level)
  print(report(found, reference, f"{args.by} per predicted byte"))


if __name__ == "__main__":
  command_line.run(main)
