"""Bits per byte over a set of images: mean, standard error, and the best and worst images as pictures."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data import images
from megabyte_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class ImageSummary:
  """Of the images all of whose bytes were scored.

  Attributes:
    images: how many.
    mean_bpb: the mean of their bits per byte; images are equally large, so it is also that of all their bytes.
    standard_error: of the mean, over images: standard deviation (n - 1) / sqrt(n); None for a single image.
    ranked: document numbers, lowest bits per byte first.
    bpb: bits per byte of each of `ranked`.
  """

  images: int
  mean_bpb: float
  standard_error: float | None
  ranked: np.ndarray
  bpb: np.ndarray

  def __str__(self) -> str:
    spread = f" +- {self.standard_error:.4f} (standard error)" if self.images > 1 else ""
    return f"{self.mean_bpb:.4f} bpb{spread} over {self.images:,} images"


def summarize(document_nats: np.ndarray, document_bytes: np.ndarray, lengths: np.ndarray) -> ImageSummary:
  """The summary of an evaluation.

  Args:
    document_nats, document_bytes: [documents], summed over each image; bytes are those that were scored.
    lengths: [documents], bytes per image. Images with fewer bytes scored are left out.

  Raises:
    ValueError: not a single image was scored as a whole.
  """
  whole = np.flatnonzero(np.asarray(document_bytes) == lengths)
  if not len(whole):
    raise ValueError("not a single image was scored as a whole; score more bytes")
  bpb = np.asarray(document_nats, np.float64)[whole] / np.asarray(document_bytes)[whole] / np.log(2)
  order = np.argsort(bpb, kind="stable")
  error = float(bpb.std(ddof=1) / np.sqrt(len(bpb))) if len(bpb) > 1 else None
  return ImageSummary(len(whole), float(bpb.mean()), error, whole[order], bpb[order])


def write_best_and_worst(
  summary: ImageSummary, source: Source, data: DataConfig, folder: epath.PathLike, count: int = 16
) -> list[str]:
  """Writes `folder`/images_best.png and images_worst.png, the most extreme image first, and returns their paths."""
  chosen = {"best": summary.ranked[:count], "worst": summary.ranked[::-1][:count]}
  paths = []
  for name, documents in chosen.items():
    pictures = [
      images.bytes_to_image(source.read(int(i), 0, int(source.lengths[i])), data.scan, data.scan_patch)
      for i in documents
    ]
    width = max(1, min(8, len(pictures), 2048 // pictures[0].shape[1]))
    rows = [pictures[i : i + width] for i in range(0, len(pictures), width)]
    paths.append(os.path.join(os.fspath(folder), f"images_{name}.png"))
    images.write_png(paths[-1], images.image_grid(rows))
  return paths
