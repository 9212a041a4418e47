"""Scores any data in bits per byte with a trained model; every byte is scored exactly once.

  python -m megabyte_jax eval --workdir=runs/quickstart                        the validation split
  python -m megabyte_jax eval --workdir=runs/quickstart --data=FILE_OR_FOLDER  data of your own
  python -m megabyte_jax eval --workdir=runs/quickstart --method=both          four passes, the best estimate (Table 11)

`python eval.py` at the top of a clone is the same command. The last line is one JSON object with bpb, bytes, nats,
seconds and more. It is also kept in the work directory as eval.json and, where a whole split was scored, as
eval_SPLIT_METHOD.json (eval_SPLIT_METHOD_strideN.json with --stride), which `python -m megabyte_jax tables` reads;
there the score of a later step stays. The next evaluation replaces eval.json and the pictures beside it; in the folder
of each evaluation, evaluations/NAME, they stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import scripts
from megabyte_jax.errors import ConfigError, require
from megabyte_jax.evaluation.windows import METHODS
from megabyte_jax.files import inputs, outputs
from megabyte_jax.files.object_stores import is_remote
from megabyte_jax.parallel import distributed


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own).

  Raises:
    ConfigError: flags do not go together, or nothing can be written where one of them says.
  """
  parser = flags.Parser(flags.called("eval"), description=__doc__)
  flags.add_run_arguments(parser)
  parser.add_argument("--split", default="validation", choices=["train", "validation", "test"])
  parser.add_argument("--data", type=flags.path, default="", help="file, folder, glob or data set, instead of a split")
  parser.add_argument("--skip-bad", action="store_true", help="leave out and count what is empty or unreadable")
  parser.add_argument("--raw", action="store_true", help="the bytes of files as they are, compressed ones, too")
  parser.add_argument("--convert-images", action="store_true", help="make grey, transparent and 16-bit images RGB")
  parser.add_argument(
    "--image-tiles", type=int, metavar="N", help="scale images to N pixels and cut tiles; 0: whole; default: the run's"
  )
  parser.add_argument("--max-pixels", type=int, default=0, help="of images; more are unreadable; default: the run's")
  parser.add_argument("--method", default="", choices=["", *METHODS], help="default: config.eval.method")
  parser.add_argument("--stride", type=int, default=0, help="bytes between sliding windows; default: half a window")
  parser.add_argument("--batch-size", type=int, default=0, help="windows at once; default: config.eval.batch_size")
  parser.add_argument("--max-bytes", type=int, default=0, help="score only the first so many bytes")
  parser.add_argument(
    "--per-byte-out",
    type=flags.path,
    default="",
    metavar="FILE.npy",
    help="write each byte's nats, float32, of all documents one after the other; NaN what --max-bytes leaves out",
  )
  parser.add_argument("--force", action="store_true", help="overwrite the file of --per-byte-out, if it exists")
  parser.add_argument(
    "--weights", default="", choices=["", "int8"], help="int8: what `generate --weights=int8` costs in bits per byte"
  )
  parser.add_argument(
    "--words", default="", metavar="N|count|pg19|pg19-SPLIT", help="word-level perplexity over so many words"
  )
  parser.add_argument(
    "--compressors", action=argparse.BooleanOptionalAction, default=True, help="compare with gzip ..."
  )
  distributed.add_arguments(parser)
  args = parser.parse_args(arguments)
  for name in ("stride", "batch_size", "max_bytes", "image_tiles", "max_pixels"):
    if (getattr(args, name) or 0) < 0:
      raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must not be negative")
  require(bool(args.per_byte_out) or not args.force, "--force is for --per-byte-out")
  if args.per_byte_out:
    if is_remote(args.per_byte_out):
      raise ConfigError(f"--per-byte-out={args.per_byte_out} is not on this machine's disks; name a file there")
    inputs.check_not_replaced("--per-byte-out", args.per_byte_out, args.data)
    if not args.force:
      outputs.check_new_file("--per-byte-out", args.per_byte_out)
    outputs.check_output_file("--per-byte-out", args.per_byte_out)
  if args.words and args.max_bytes:
    raise ConfigError("--words and --max-bytes exclude each other: the words are those of the whole text")
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Reads the command line and evaluates as it says."""
  args = parse_arguments(arguments)
  scripts.load("eval").run(args)
