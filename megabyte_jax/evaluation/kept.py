"""Gives each evaluation a folder of its own, so that none of other data is lost, and copies the newest one's files."""

from __future__ import annotations

import hashlib
import json
import os
import re

from etils import epath

from megabyte_jax.files.atomic_file import replacing

FOLDER = "evaluations"
_COPIED = ("eval_positions.json", "eval_by_context.png", "eval_by_patch.png", "images_best.png", "images_worst.png")


def name_of_data(spec: str) -> str:
  """Returns a name for files about a source of data, readable, and another one for every other place.

  It has the end of the source's own name, without what file systems or shells make something of, and a checksum.
  """
  last = re.sub(r"[^\w.]+", "-", os.path.basename(spec.rstrip("/")))[-40:].strip("-.")
  return "-".join(filter(None, (last, hashlib.sha256(os.fsencode(os.path.abspath(spec))).hexdigest()[:8])))


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
  if not replace and file.exists() and _step_of(file.read_text()) > _step_of(line):
    return name
  write_line(workdir, name, line)
  return ""


def _step_of(line: str) -> int:
  try:
    step = json.loads(line)["step"]
  except (ValueError, KeyError, TypeError, RecursionError):  # somebody else's file
    return 0
  return step if isinstance(step, int) else 0


def copy_newest(folder: epath.PathLike, workdir: epath.PathLike) -> None:
  """Copies an evaluation's bits by position and pictures, those that there are, into the work directory."""
  for name in _COPIED:
    file = epath.Path(folder) / name
    if file.exists():
      with replacing(os.path.join(workdir, name)) as path:
        file.copy(path)
