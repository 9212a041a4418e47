"""Records validation bits per byte beside the checkpoints, so that the best ones are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from megabyte_jax.errors import CheckpointError
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.json_files import read_json

BEST_FILE = "validation_bpb.json"


class BestSteps:
  """Bits per byte of checkpoints, in `folder`/validation_bpb.json: {"step": bits per byte}; process 0 writes."""

  def __init__(self, folder: epath.Path, keep: int):
    """Reads what is there.

    Args:
      folder: of the checkpoints.
      keep: how many of the best ones are to stay.
    """
    self._path, self._keep = folder / BEST_FILE, keep
    self._bpb = _read(self._path)

  def put(self, step: int, bpb: float) -> None:
    """Writes down how well the checkpoint of `step` did, if that is a number."""
    if not math.isfinite(bpb):
      return
    self._bpb[step] = float(bpb)
    if jax.process_index() == 0:
      with replacing(self._path) as path:
        path.write_text(json.dumps({str(step): bpb for step, bpb in sorted(self._bpb.items())}) + "\n")

  def best(self, steps: Sequence[int], count: int = 1) -> list[int]:
    """Returns the best `count` of `steps`, best first, the later of two equal ones; not those never measured."""
    measured = [step for step in steps if step in self._bpb]
    return sorted(measured, key=lambda step: (self._bpb[step], -step))[:count]

  def reload(self) -> None:
    """Reads what another process has written since."""
    self._bpb = _read(self._path)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Tells for each checkpoint, in order, whether it stays, as Orbax asks its preservation policies."""
    stay = self.best([checkpoint.step for checkpoint in checkpoints], self._keep)
    return [checkpoint.step in stay for checkpoint in checkpoints]


def _read(path: epath.Path) -> dict[int, float]:
  try:
    written = read_json(path, CheckpointError, "remove it")
    return {int(step): float(bpb) for step, bpb in written.items()}
  except (OSError, CheckpointError, ValueError, TypeError, OverflowError):
    return {}  # never written, or not by us: it is written anew at the next evaluation
