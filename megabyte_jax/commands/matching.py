"""Compute matching: how many layers give a candidate the cost of a reference (section 4.1, appendix A.2).

  python -m megabyte_jax.matching --reference=configs/paper/table2.py:pg19_megabyte \\
    --candidate=configs/paper/table2.py:pg19_transformer

prints the candidate's layers at which the costs per predicted byte agree best, and the flag that sets them.

  --by=flops  analytic training FLOPs (causal attention; instant)
  --by=time   measured seconds of the training step, on the devices at hand, as the paper did: reference and candidate
              in turns, so that both are in memory at once. Reduce the batches with --reference.batch_size and
              --candidate.batch_size where the configs' own do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from megabyte_jax.commands import command_line
from megabyte_jax.config import Config
from megabyte_jax.errors import require
from megabyte_jax.planning.matching import cost_against, match, report


def define_flags() -> None:
  """Those of this command."""
  config_flags.DEFINE_config_file("reference", help_string="config whose cost is to be matched")
  config_flags.DEFINE_config_file("candidate", help_string="config whose layers are solved for")
  flags.DEFINE_enum("by", "flops", ["flops", "time"], "what to match: analytic FLOPs or measured time")
  flags.DEFINE_integer("level", -1, "level of the candidate whose layers vary, from 0; -1 is the finest")
  rounds = "with --by=time, how often both are timed for each count"
  flags.DEFINE_integer("rounds", 10, rounds, lower_bound=1)


def main(argv: Sequence[str]) -> None:
  """Prints the solution."""
  options = flags.FLAGS
  require(len(argv) == 1, f"{' '.join(argv[1:])!r} is no flag; give --reference=CONFIG and --candidate=CONFIG")
  for name, value in (("reference", options.reference), ("candidate", options.candidate)):
    require(value is not None, f"--{name} is missing; give a config, such as configs/paper/table2.py:pg19_megabyte")
  reference, candidate = Config.from_dict(options.reference), Config.from_dict(options.candidate)
  found = match(candidate, cost_against(reference, options.by, options.rounds), options.level)
  print(report(found, reference, f"{options.by} per predicted byte"))


if __name__ == "__main__":
  define_flags()
  command_line.run_with_flags(main)
