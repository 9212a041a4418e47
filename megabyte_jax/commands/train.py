"""Trains a model, or resumes its training; the whole loop is in train.py.

  python -m megabyte_jax train                                          the quick start
  python -m megabyte_jax train --config=configs/NAME.py --workdir=DIR   a run of your own; again: resumes it
  python -m megabyte_jax train --config.batch_size=8 --config.model.levels[0].num_layers=6    any field can be changed

`python train.py` at the top of a clone is the same command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import scripts
from megabyte_jax.config.shipped import shipped
from megabyte_jax.parallel import distributed


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own) and the config that it names."""
  parser = flags.Parser(flags.called("train"), description=__doc__)
  text = "what to train (default: configs/quickstart.py); --config.KEY=VALUE changes any of it"
  parser.add_config("config", text, str(shipped("configs/quickstart.py")))
  text = "where checkpoints, metrics and pictures go; default: runs/quickstart"
  parser.add_argument("--workdir", type=flags.path, default="runs/quickstart", help=text)
  parser.add_argument(
    "--init_from",
    type=flags.path,
    default="",
    metavar="DIR",
    help="start a new run from the parameters of the run in this folder",
  )
  distributed.add_arguments(parser)
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  """Reads the command line and trains as it says."""
  args = parse_arguments(arguments)
  scripts.load("train").run(args)
