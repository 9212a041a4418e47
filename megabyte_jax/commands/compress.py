"""Compresses any file without loss with a trained model's probabilities, and gets it back.

python -m megabyte_jax compress FILE OUT --workdir=runs/quickstart
python -m megabyte_jax compress --decompress OUT COPY --workdir=runs/quickstart

The model's probabilities are adapted to the file as it goes, unless --no-adapt is given. Decompression needs the same
checkpoint on the same kind of device with as many CPU cores, the same XLA_FLAGS and the same versions of JAX, Flax,
NumPy and constriction: it must compute the same probabilities to the last bit. The file says what it was made with, and
a difference is an error. Training that goes on deletes old checkpoints, and what was compressed with them is lost:
export such a model first (`python -m megabyte_jax export`). What the model makes no smaller, such as a PNG or MP3 file,
is stored as it is: the result is at most 128 bytes larger.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import command_line
from megabyte_jax.display.progress import Progress, duration, human
from megabyte_jax.errors import ConfigError, DataError, require
from megabyte_jax.files import inputs, outputs

if TYPE_CHECKING:
  from megabyte_jax.config import Config


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own).

  Raises:
    ConfigError: flags do not go together, OUT exists, or nothing can be written to it.
  """
  parser = flags.Parser(flags.called("compress"), description=__doc__)
  parser.add_argument("file", type=flags.path, help="what to compress; with --decompress the compressed file")
  parser.add_argument("out", type=flags.path, help="where the result goes")
  parser.add_argument("--decompress", action="store_true", help="get the original back")
  parser.add_argument("--force", action="store_true", help="overwrite OUT, if it exists")
  flags.add_run_arguments(parser)
  parser.add_argument("--batch-size", type=int, default=0, help="windows side by side; default: 64")
  parser.add_argument("--window", type=int, default=0, help="bytes of a window; default: 2048, or the context if less")
  parser.add_argument("--no-adapt", action="store_true", help="do not adapt the probabilities to the file")
  args = parser.parse_args(arguments)
  for flag, value in {"--batch-size": args.batch_size, "--window": args.window, "--no-adapt": args.no_adapt}.items():
    require(value >= 0, f"{flag} is {value}; it must not be negative")
    require(not (args.decompress and value), f"{flag} is for compressing; the file says the rest")
  inputs.check_readable(args.file, DataError)
  inputs.check_not_replaced("OUT", args.out, args.file)
  if not args.force:
    outputs.check_new_file("OUT", args.out)
  outputs.check_output_file("OUT", args.out)
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Compresses or decompresses one file; the result appears whole or not at all."""
  args = parse_arguments(arguments)
  from megabyte_jax.checkpoints.exported import is_exported
  from megabyte_jax.checkpoints.saved_config import load_config
  from megabyte_jax.checkpoints.trained_model import describe_step, load
  from megabyte_jax.files.atomic_file import is_standard_output, replacing
  from megabyte_jax.generation import compression, entropy_coding
  from megabyte_jax.generation.compression import BATCH, WINDOW, compress, decompress
  from megabyte_jax.parallel.compilation_cache import keep_compiled_programs

  entropy_coding.constriction()  # missing? then say so at once
  with inputs.waiting_is_said(args.file) as waiting, open(args.file, "rb") as file:
    waiting.cancel()  # it opens when somebody writes
    data = file.read()
  with _naming(args.file):
    again = compression.is_compressed(data) and not args.decompress
    require(not again, "this is a compressed file; give --decompress to restore it")
    header = compression.read(data)[0] if args.decompress else None
    model, length, step = None, header.length if header else len(data), 0
    if header is None or header.coding:  # what is stored needs no model
      config = load_config(args.workdir)
      form = config.data.form
      require(form != "subwords", f"{args.workdir} is a model of subwords; compress with one that reads bytes")
      keep_compiled_programs()
      model, _, step = load(args.workdir, args.step)
      print(describe_step(args.workdir, step, config), file=sys.stderr)
    with Progress("decompressing" if args.decompress else "compressing", total=length, compiles=True) as progress:
      if model is None or args.decompress:
        made = decompress(model, data, on_bytes=progress.add)
      else:
        made = compress(
          model,
          data,
          step=step,
          batch=args.batch_size or BATCH,
          window=args.window or WINDOW,
          adapt=not args.no_adapt,
          on_bytes=progress.add,
        )
  with replacing(args.out) as path:
    path.write_bytes(made)
  seconds = progress.seconds
  speed = f"in {duration(seconds)} ({human(length / seconds, 'B/s')}, compilation included)"
  more = "" if model is None or args.decompress else compression.what_bits_are_for(made, model.config)
  to = sys.stderr if is_standard_output(args.out) else sys.stdout
  print(f"{len(data):,} bytes -> {len(made):,} {speed}{more}", file=to)
  if not args.decompress and compression.read(made)[0].coding and not is_exported(args.workdir):
    _warn_of_unfinished(args.workdir, step, config)


def _warn_of_unfinished(workdir: str, step: int, config: Config) -> None:
  """Says that training which goes on may delete the checkpoint that decompression needs."""
  from etils import epath

  from megabyte_jax.checkpoints.format import FOLDER

  for_good = config.checkpoint.keep_every_steps
  finished = (epath.Path(workdir) / FOLDER / str(config.num_steps)).exists()
  if not finished and not (for_good and step % for_good == 0):
    print(
      f"notice  step {step:,} of {config.num_steps:,} may be deleted when training goes on, and the file cannot be "
      "restored then; export the model first "
      f"(python -m megabyte_jax export FOLDER --workdir={shlex.quote(workdir)} --step={step})",
      file=sys.stderr,
    )


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  try:
    yield
  except (ConfigError, DataError) as error:
    raise type(error)(f"{path}: {error.args[0]}", *error.args[1:]) from error


if __name__ == "__main__":
  command_line.run(main)
