"""Checks that a checkpoint is one that this code writes, and stands where it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from megabyte_jax.errors import CheckpointError

FOLDER = "checkpoints"  # of a run, in its work directory
FORMAT = 1  # another number for each change of what is written; only this one is read


def check_format(folder: epath.Path, step: int, meta: Mapping[str, Any]) -> None:
  """Checks a checkpoint's own word on its format and step against the folder that it lies in.

  Args:
    folder: of the checkpoint.
    step: that the folder is named after.
    meta: as `Checkpoints.save` writes it.

  Raises:
    CheckpointError: it has another format, or was saved at another step and renamed since.
  """
  if meta.get("format") != FORMAT:
    raise CheckpointError(
      f"{folder} has format {meta.get('format')}, and this megabyte_jax reads {FORMAT} alone; "
      "take the version that wrote it, or start anew in another --workdir"
    )
  if meta.get("step") != step:
    raise CheckpointError(f"{folder} holds step {meta.get('step')}; give it this name back, or move it elsewhere")
