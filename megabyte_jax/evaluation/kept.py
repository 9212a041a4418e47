"""Gives each evaluation a folder of its own, so that none of other data is lost, and copies the newest one's files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys

from etils import epath

from megabyte_jax.config import Config
from megabyte_jax.data.sources import Source
from megabyte_jax.errors import in_one_line
from megabyte_jax.evaluation import image_report, report
from megabyte_jax.evaluation.evaluate import Evaluation
from megabyte_jax.files import outputs
from megabyte_jax.files.atomic_file import replacing

FOLDER = "evaluations"
_COPIED = ("eval_positions.json", "eval_by_context.png", "eval_by_patch.png", "images_best.png", "images_worst.png")


def name_of_data(spec: str) -> str:
  """Returns a name for files about a source of data, readable, and another one for every other place.

  It has the end of the source's own name, without what file systems or shells make something of, and a checksum.
  """
  last = re.sub(r"[^\w.]+", "-", os.path.basename(spec.rstrip("/")))[-40:].strip("-.")
  place = os.path.abspath(spec) if os.path.exists(spec) else spec  # such as tfds:NAME:SPLIT
  return "-".join(filter(None, (last, hashlib.sha256(os.fsencode(place)).hexdigest()[:8])))


def write_line(folder: epath.PathLike, name: str, line: str) -> None:
  """Writes one line as a file of `folder`, which is made where it is missing."""
  with replacing(os.path.join(folder, name)) as path:
    path.write_text(line + "\n")


def write_score(workdir: epath.PathLike, split: str, method: str, line: str, *, replace: bool = False) -> str:
  """Writes the line of a whole split as eval_SPLIT_METHOD.json of a run, which `tables --runs` reads.

  Unless `replace` is given, the score of a later step stays.

  Returns:
    The file's name if it stayed; else ''.
  """
  name = f"eval_{split}_{method}.json"
  file = epath.Path(workdir) / name
  if not replace and file.exists() and _step_of(file.read_bytes()) > _step_of(line):
    return name
  write_line(workdir, name, line)
  return ""


def write_last_score(config: Config, validation: Source, result: Evaluation, workdir: str) -> None:
  """Writes the score of a run's last step as `eval.py` would; warns where that is not possible.

  It replaces that of any step: what is there of a later one is of another run that lay here.
  """
  images = image_report.summarize_evaluation(config.data, validation, result)
  facts = report.facts(config, validation, result, config.num_steps, workdir, images, split="validation")
  try:
    write_score(workdir, "validation", result.method, report.result_json(result, **facts), replace=True)
  except OSError as error:  # the run is done, and its score is on the screen
    print(in_one_line(f"warning: the score is not kept in {workdir}: {outputs.in_words(error)}"), file=sys.stderr)


def _step_of(line: str | bytes) -> int:
  try:
    step = json.loads(line)["step"]
  except (ValueError, KeyError, TypeError, RecursionError):  # somebody else's file
    return 0
  return step if isinstance(step, int) else 0


def copy_newest(folder: epath.PathLike, workdir: epath.PathLike) -> None:
  """Copies an evaluation's bits by position and pictures into the work directory; files that it lacks go from there."""
  for name in _COPIED:
    file = epath.Path(folder) / name
    if file.exists():
      with replacing(os.path.join(workdir, name)) as path:
        file.copy(path)
    else:
      (epath.Path(workdir) / name).unlink(missing_ok=True)
