"""Bits per byte of a trained model on any data; every byte is scored exactly once.

  python eval.py --workdir=runs/quickstart                                the validation split
  python eval.py --workdir=runs/quickstart --data=FILE_OR_FOLDER          data of your own
  python eval.py --workdir=runs/quickstart --method=both                  four passes, the best estimate (Table 11)

The last line is one JSON object with bpb, bytes, nats, seconds and more. It is also kept in the work directory as
eval.json and, where a whole split was scored, as eval_SPLIT_METHOD.json (eval_SPLIT_METHOD_strideN.json with --stride),
which `python -m megabyte_jax tables` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Sequence

from megabyte_jax.commands import command_line
from megabyte_jax.commands.eval import parse_arguments

if __name__ == "__main__":  # before the imports below: --help and mistakes are answered at once
  ARGUMENTS = command_line.read(parse_arguments)

import jax
import numpy as np
from etils import epath
from flax import nnx

from megabyte_jax.checkpoints.saved_config import load_config
from megabyte_jax.checkpoints.trained_model import evaluation_mesh, load
from megabyte_jax.config import Config
from megabyte_jax.data.open_data import open_path, open_source
from megabyte_jax.data.sources import Source
from megabyte_jax.display import plots
from megabyte_jax.errors import ConfigError, DataError, require
from megabyte_jax.evaluation import image_report, perplexity, report
from megabyte_jax.evaluation.by_source import by_source
from megabyte_jax.evaluation.evaluate import Evaluation
from megabyte_jax.files import outputs
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models.loss import bits_per_byte
from megabyte_jax.parallel import distributed


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
  distributed.start_from_arguments(args)
  config = load_config(args.workdir)
  tiles = config.data.image_tiles if args.image_tiles is None else args.image_tiles
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(
      config.data,
      skip_bad=args.skip_bad or config.data.skip_bad,
      raw=args.raw or config.data.raw,
      convert_images=args.convert_images or config.data.convert_images,
      image_tiles=tiles,
    ),
    eval=dataclasses.replace(config.eval, batch_size=args.batch_size or config.eval.batch_size),
  )
  mesh = evaluation_mesh(config.mesh)
  if args.data:
    source = open_path(args.data, config.data, skip_empty=True)  # they have no byte that could be scored
  else:
    source = open_source(config.data, args.split)
  words = number_of_words(args.words, args.split if not args.data else "", source) if args.words else 0
  length = int(source.lengths.sum())
  require(words <= length, f"--words={args.words}: {words:,} words cannot be those of {length:,} bytes")
  model, _, step = load(args.workdir, args.step, mesh)
  parameters = nnx.to_pure_dict(nnx.state(model))
  print(f"step {step} of {args.workdir}, {report.count_documents(source)} of {args.data or args.split}")
  if tiles and config.data.form == "image":
    print(f"images are scaled to {tiles} pixels and cut into tiles; --image-tiles=0 takes them whole")

  compare = args.compressors and config.data.form == "bytes" and not args.max_bytes
  with contextlib.ExitStack() as writing:
    per_byte = None
    if args.per_byte_out and jax.process_index() == 0:
      per_byte = PerByte(writing.enter_context(replacing(args.per_byte_out)), source.lengths)
    result = report.evaluate_and_print(
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
  more = {"step": step, "data": args.data or getattr(config.data, args.split), "workdir": args.workdir}
  if not args.data:
    more["split"] = args.split
  if source.skipped:
    more["skipped"] = source.skipped
  if sources := by_source(source, result):
    more["sources"] = [one._asdict() for one in sources]
  if args.stride:
    more["stride"] = args.stride
  if words:
    more["words"] = words
    per_word = perplexity.word_perplexity(result.nats, words)
    more["word_perplexity"] = per_word if math.isfinite(per_word) else None  # JSON has no infinity
    print(f"word-level perplexity {per_word:.2f} ({words:,} words)")
  if jax.process_index() == 0:
    images = summarize_images(config, source, result)
    if images:
      print(images)
      more |= {"images": images.images, "mean_bpb": images.mean_bpb, "standard_error": images.standard_error}
      more |= {"tiles": images.tiles} if images.tiles else {}
    line = report.result_json(result, **more)
    try:
      write_positions(args.workdir, result)
      if images:
        print("pictures:", *image_report.write_best_and_worst(images, source, config.data, args.workdir))
      names = ["eval.json"]
      if not (args.data or args.max_bytes):
        names.append(f"eval_{args.split}_{result.method}{f'_stride{args.stride}' if args.stride else ''}.json")
      for name in names:
        with replacing(os.path.join(args.workdir, name)) as path:
          path.write_text(line + "\n")
    except (OSError, plots.PlotError) as error:  # somebody else's run, perhaps; the result is worth more than its files
      print(f"warning: not all is kept in {args.workdir}: {outputs.in_words(error)}", file=sys.stderr)
    print(line)
    return line
  return ""


def training_data(config: Config) -> Source | None:
  """For the compressors' primed figures; None where the data are not here, which evaluation does not need."""
  try:
    return open_source(config.data, "train")
  except (ConfigError, DataError, ImportError, OSError):
    return None


def number_of_words(words: str, split: str, source: Source) -> int:
  """The words of the text: a number, `count` to count them, or that data set's official number.

  `pg19` is PG-19's number for the split evaluated, `pg19-SPLIT` that of another name of the same text. Documents are
  counted one by one: the last word of one and the first of the next are two.
  """
  if words == "count":
    read = (source.read(i, 0, int(length)) for i, length in enumerate(source.lengths))
    return sum(perplexity.count_words(text) for text in read)
  if words == "pg19" and not split:
    raise ConfigError("--words=pg19 with --data: which split is it? Take pg19-train, pg19-validation or pg19-test")
  if words in ("pg19", *(f"pg19-{name}" for name in perplexity.PG19)):
    return perplexity.PG19[words.partition("-")[2] or split].words
  if not words.isdigit() or not int(words):
    raise ConfigError(f"--words={words} is neither a number nor count nor pg19 nor pg19-{{train,validation,test}}")
  return int(words)


class PerByte:
  """Each byte's nats, in a .npy file.

  Args:
    path: of the file, as yet.
    lengths: bytes of each document.
  """

  def __init__(self, path: epath.Path, lengths: np.ndarray):
    self.first = np.concatenate([[0], np.cumsum(lengths)])
    count = int(self.first[-1])
    nothing = np.full(min(count, 1 << 20), np.nan, np.float32)  # as --max-bytes leaves it
    with open(path, "wb") as file:  # a full disk is told here; writing to memory-mapped holes it would kill the process
      np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
      for start in range(0, count, len(nothing)):
        file.write(nothing[: count - start].data)
    self.nats = np.load(path, mmap_mode="r+")

  def put(self, document: int, start: int, nats: np.ndarray, mask: np.ndarray) -> None:
    """Keeps the nats of a window where its mask is True."""
    at = int(self.first[document]) + start
    self.nats[at : at + len(nats)][mask] = nats[mask]


def summarize_images(config: Config, source: Source, result: Evaluation) -> image_report.ImageSummary | None:
  """Mean and standard error over whole images; None where the data are no images, or none was scored whole."""
  if config.data.form != "image" or not (result.document_bytes == source.lengths).any():
    return None
  tiles = source.names if config.data.image_tiles else ()
  return image_report.summarize(result.document_nats, result.document_bytes, source.lengths, tiles)


_POINTS = 4096  # a file or a picture of more positions helps nobody


def write_positions(workdir: str, result: Evaluation) -> None:
  """Bits by position in the patch (Fig. 5) and in the window (Fig. 4): a JSON file and a picture of each.

  Long contexts are written in bins of equal width, `context_bin_width` bytes each.
  """
  width = -(-len(result.context_nats) // _POINTS)
  starts = np.arange(0, len(result.context_nats), width)
  context_nats, context_bytes = (np.add.reduceat(a, starts) for a in (result.context_nats, result.context_bytes))
  with np.errstate(invalid="ignore"):
    patch = bits_per_byte(result.patch_nats, result.patch_bytes)
    context = bits_per_byte(context_nats, context_bytes)
  values = {"patch": patch.tolist(), "patch_bytes": result.patch_bytes.tolist()}
  values |= {"context_bin_width": width, "context": context.tolist(), "context_bytes": context_bytes.tolist()}
  with replacing(os.path.join(workdir, "eval_positions.json")) as path:
    path.write_text(json.dumps(values).replace("NaN", "null") + "\n")
  picture = os.path.join(workdir, "eval_by_context.png")
  plots.loss_by_position(context, picture, "Loss by position", "byte in context", bin_width=width)
  if len(patch) > 1 and result.method in ("basic", "sliding"):  # the others score only half of each patch
    plots.loss_by_position(patch, os.path.join(workdir, "eval_by_patch.png"), "Loss by position", "byte in patch")


if __name__ == "__main__":
  command_line.run(lambda: run(ARGUMENTS))
