"""Writes bits by position, in the patch (Fig. 5 of the paper) and in the window (Fig. 4)."""

from __future__ import annotations

import json
import os

import numpy as np

from megabyte_jax.display import plots
from megabyte_jax.evaluation.evaluate import Evaluation
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models.loss import bits_per_byte

_POINTS = 4096  # a file or a picture of more positions helps nobody


def write_positions(workdir: str, result: Evaluation, unit: str = "byte", of: str = "") -> list[str]:
  """Writes eval_positions.json and a picture of each of its curves to `workdir`; returns the pictures' paths.

  Long contexts are written in bins of equal width, `context_bin_width` positions each.

  Args:
    unit: what stands at a position: byte or token. Values are bits per byte in either case.
    of: what was scored, and the step, for the pictures' titles.
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
  # The pictures' font has few other letters.
  title = f"Loss by position: {of}".encode("latin-1", "replace").decode("latin-1") if of else "Loss by position"
  pictures = [os.path.join(workdir, "eval_by_context.png")]
  plots.loss_by_position(
    context, pictures[0], title, f"{unit} in context", bin_width=width, weights=context_bytes.tolist()
  )
  if len(patch) > 1 and result.method in ("basic", "sliding"):  # the others score only half of each patch
    pictures.append(os.path.join(workdir, "eval_by_patch.png"))
    plots.loss_by_position(patch, pictures[1], title, "byte in patch", weights=result.patch_bytes.tolist())
  return pictures
