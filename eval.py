"""Scores data with a trained model, in bits per byte; what is written where is in megabyte_jax/commands/eval.py.

python eval.py --workdir=runs/quickstart                                the validation split
python eval.py --workdir=runs/quickstart --data=FILE_OR_FOLDER          data of your own
python eval.py --workdir=runs/quickstart --method=both                  four passes, the best estimate (Table 11)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from megabyte_jax.commands import command_line
from megabyte_jax.commands.eval import parse_arguments

if __name__ == "__main__":  # before the imports below: --help and mistakes are answered at once
  ARGUMENTS = command_line.read(parse_arguments)

import jax
from flax import nnx
from jax.sharding import Mesh

from megabyte_jax.checkpoints.exported import is_exported
from megabyte_jax.checkpoints.saved_config import is_shipped, load_config
from megabyte_jax.checkpoints.trained_model import describe_step, evaluation_mesh, load
from megabyte_jax.config import Config
from megabyte_jax.data.open_data import open_path, open_source
from megabyte_jax.data.sources import Source
from megabyte_jax.display import plots
from megabyte_jax.errors import ConfigError, DataError, in_one_line, require
from megabyte_jax.evaluation import image_report, kept, perplexity, report, windows
from megabyte_jax.evaluation.evaluate import Evaluation
from megabyte_jax.evaluation.nats_of_each_byte import PerByte
from megabyte_jax.evaluation.positions import write_positions
from megabyte_jax.files import outputs
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models.build import in_eight_bits
from megabyte_jax.parallel import distributed
from megabyte_jax.parallel.compilation_cache import keep_compiled_programs


def main(arguments: Sequence[str] | None = None) -> str:
  """Reads the arguments (None: the command line's) and evaluates as they say; see `run`."""
  return run(parse_arguments(arguments))


def run(args: argparse.Namespace) -> str:
  """Evaluates, and writes eval.json and pictures into the work directory.

  Args:
    args: what `parse_arguments` read.

  Returns:
    The last line that it prints, one JSON object; '' in all but one of several processes.
  """
  distributed.start_from_arguments(args, agree_on_sigterm=False)  # nothing is saved that could be resumed
  config = with_options(load_config(args.workdir), args)
  windows.check_method(config.model, args.method or config.eval.method, args.stride)
  require(
    not args.per_byte_out or config.data.form != "subwords",
    "--per-byte-out is for models that read bytes; this one reads subwords, whose bytes have no nats of their own",
  )
  mesh = evaluation_mesh(config.mesh)
  if args.data:
    source = open_path(args.data, config.data, skip_empty=True)  # they have no byte that could be scored
  else:
    named = getattr(config.data, args.split)
    require(bool(named), f"config.data.{args.split} is empty; name a file, folder or data set with --data")
    try:
      source = open_source(config.data, args.split)
    except (ConfigError, DataError) as error:
      if is_exported(args.workdir):
        raise ConfigError(f"{args.workdir} comes without its data ({named}); give --data=FILE_OR_FOLDER") from error
      raise type(error)(*error.args, "use --data=FILE_OR_FOLDER to score other data") from error
  words = perplexity.number_of_words(args.words, "" if args.data else args.split, source) if args.words else 0
  keep_compiled_programs()
  model, _, step = load(args.workdir, args.step, mesh)
  print(f"{describe_step(args.workdir, step, config)}, {report.count_documents(source, args.data or args.split)}")
  for line in report.notice_lines(
    [*report.data_notices(config.data, source), *report.trained_on(config.data, args.data)]
  ):
    print(line)
  if config.data.image_tiles and config.data.form == "image":
    print(f"images are scaled to {config.data.image_tiles} pixels and cut into tiles; --image-tiles=0 takes them whole")

  parameters = nnx.to_pure_dict(nnx.state(model))
  if args.weights:
    parameters = in_eight_bits(config.model, parameters)
  result = score(config, args, parameters, source, mesh)
  if jax.process_index() > 0:
    return ""
  images = image_report.summarize_evaluation(config.data, source, result)
  more = report.facts(config, source, result, step, args.workdir, images, split=args.split, data=args.data)
  more |= {name: value for name, value in (("weights", args.weights), ("stride", args.stride)) if value}
  if words:
    per_word = perplexity.word_perplexity(result.nats, words)
    more |= {"words": words, "word_perplexity": per_word if math.isfinite(per_word) else None}  # JSON has no infinity
    print(f"word-level perplexity {per_word:.2f} ({words:,} words)")
  if images:
    print(images)
  line = report.result_json(result, **more)
  keep(line, step, args, config, source, result, images)
  print(line)
  return line


def with_options(config: Config, args: argparse.Namespace) -> Config:
  """Returns the run's config as the command line changes it."""
  data = dataclasses.replace(
    config.data,
    skip_bad=args.skip_bad or config.data.skip_bad,
    raw=args.raw or config.data.raw,
    convert_images=args.convert_images or config.data.convert_images,
    image_tiles=config.data.image_tiles if args.image_tiles is None else args.image_tiles,
    max_pixels=args.max_pixels or config.data.max_pixels,
  )
  scoring = dataclasses.replace(config.eval, batch_size=args.batch_size or config.eval.batch_size)
  return dataclasses.replace(config, data=data, eval=scoring)


def score(config: Config, args: argparse.Namespace, parameters: Any, source: Source, mesh: Mesh) -> Evaluation:
  """Scores the source, writes each byte's nats where --per-byte-out says, and prints the table of bits per byte."""
  compare = args.compressors and not args.max_bytes
  with contextlib.ExitStack() as writing:
    per_byte = None
    if args.per_byte_out and jax.process_index() == 0:
      per_byte = PerByte(writing.enter_context(replacing(args.per_byte_out)), source.lengths)
    return report.evaluate_and_print(
      config,
      parameters,
      source,
      mesh,
      primer=functools.partial(training_data, config) if compare else None,
      with_compressors=compare,
      method=args.method or config.eval.method,
      stride=args.stride,
      max_bytes=args.max_bytes,
      on_byte_nats=per_byte.put if per_byte else None,
    )


def training_data(config: Config) -> Source | None:
  """Opens the data of the compressors' primed figures; None where they are not here, which evaluation does not need."""
  try:
    return open_source(config.data, "train")
  except (ConfigError, DataError, ImportError, OSError):
    return None


def keep(
  line: str,
  step: int,
  args: argparse.Namespace,
  config: Config,
  source: Source,
  result: Evaluation,
  images: image_report.ImageSummary | None,
) -> None:
  """Writes the result, bits by position and pictures into the work directory; warns where that is not possible.

  They go into a folder of this evaluation, so that those of other data stay, and are copied as the newest ones.
  Nothing is written into the package, where a shipped model lies.
  """
  if is_shipped(args.workdir):
    return
  method = f"{result.method}_stride{args.stride}" if args.stride else result.method
  try:
    folder = os.path.join(args.workdir, kept.FOLDER, folder_name(args, method))
    for place in (folder, args.workdir):
      kept.write_line(place, "eval.json", line)
    if not (args.data or args.max_bytes or args.weights or other_reading(args)):
      later = kept.write_score(args.workdir, args.split, method, line, replace=args.step == "best")
      if later:
        print(in_one_line(f"{later} in {args.workdir} keeps the score of a later step"))
    scored = args.data or getattr(config.data, args.split)
    of = f"{'...' * (len(scored) > 40)}{scored[-40:]}, step {step:,}"
    pictures = write_positions(folder, result, config.data.unit, in_one_line(of))
    if images:
      pictures += image_report.write_best_and_worst(images, source, config.data, folder)
    kept.copy_newest(folder, args.workdir)
    print(in_one_line(f"kept in {folder}"))
    print(in_one_line(f"pictures: {' '.join(pictures)}"))
  except (OSError, plots.PlotError) as error:  # somebody else's run, perhaps; the result is worth more than its files
    print(in_one_line(f"warning: not all is kept in {args.workdir}: {outputs.in_words(error)}"), file=sys.stderr)


def folder_name(args: argparse.Namespace, method: str) -> str:
  """Returns a name for what is kept of an evaluation: what is scored, how, and what else was asked for."""
  parts = [kept.name_of_data(args.data) if args.data else args.split, method]
  parts += [f"step{args.step}"] if args.step else []
  parts += other_reading(args)
  parts += ([f"first{args.max_bytes}"] if args.max_bytes else []) + ([args.weights] if args.weights else [])
  return "_".join(parts)


def other_reading(args: argparse.Namespace) -> list[str]:
  """Returns names for the options that make other bytes of the same data than the run's own settings do."""
  given = {"raw": args.raw, "rgb": args.convert_images, f"pixels{args.max_pixels}": args.max_pixels}
  tiles = [] if args.image_tiles is None else [f"tiles{args.image_tiles}"]
  return [name for name, value in given.items() if value] + tiles


if __name__ == "__main__":
  command_line.run(lambda: run(ARGUMENTS))
