"""Exports a trained model as safetensors and config.json, for other programs or to be given away.

  python -m megabyte_jax export FOLDER --workdir=runs/quickstart
  python -m megabyte_jax export FOLDER --workdir=runs/quickstart --dtype=bfloat16 --max-file-size=4000000

FOLDER is then a --workdir for eval, generate, compress and --init_from, without the optimizer's state. Each layer's
parameters are tensors of their own, named as in checkpoints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import command_line
from megabyte_jax.errors import require
from megabyte_jax.files import outputs


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own).

  Raises:
    ConfigError: nothing can be written to FOLDER, or a size is not positive.
  """
  parser = flags.Parser(flags.called("export"), description=__doc__)
  parser.add_argument("folder", type=flags.path, help="a new folder")
  flags.add_run_arguments(parser)
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="float32 keeps every bit")
  parser.add_argument("--max-file-size", type=int, default=2**32, metavar="BYTES", help="of each file at most")
  args = parser.parse_args(arguments)
  require(args.max_file_size > 0, f"--max-file-size is {args.max_file_size}; it must be positive")
  outputs.check_on_disk("FOLDER", args.folder)
  outputs.check_output_folder("FOLDER", args.folder)
  outputs.check_folder_name("FOLDER", args.folder)
  outputs.check_new_folder("FOLDER", args.folder)
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Exports one checkpoint's parameters; the folder appears whole or not at all."""
  args = parse_arguments(arguments)
  from flax import nnx

  from megabyte_jax.checkpoints.exported import export_model
  from megabyte_jax.checkpoints.trained_model import load

  model, config, step = load(args.workdir, args.step)
  parameters = nnx.to_pure_dict(nnx.state(model))
  export_model(args.folder, config, parameters, step, args.dtype, args.max_file_size)
  print(f"step {step} of {args.workdir} is in {args.folder}")


if __name__ == "__main__":
  command_line.run(main)
