"""Reports bits per byte over a set of images: mean, standard error, and pictures of the best and worst."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data.media import patch_scan, pictures
from megabyte_jax.data.media.image_source import image_of
from megabyte_jax.data.sources import Source
from megabyte_jax.evaluation.evaluate import Evaluation


@dataclasses.dataclass(frozen=True)
class ImageSummary:
  """Statistics of the images, or tiles of images, all of whose bytes were scored.

  Attributes:
    images: number of images, also where these were cut into tiles.
    tiles: number of tiles; 0 where images were not cut.
    mean_bpb: mean bits per byte; all are equally large, so it is also the mean over bytes.
    standard_error: of the mean, over images: standard deviation (n - 1) / sqrt(n); None for a single image. Tiles of
      one image are correlated, so their deviations from the mean are first summed per image.
    ranked: document numbers, lowest bits per byte first.
    bpb: bits per byte of each of `ranked`.
  """

  images: int
  tiles: int
  mean_bpb: float
  standard_error: float | None
  ranked: np.ndarray
  bpb: np.ndarray

  def __str__(self) -> str:
    spread = f" +- {self.standard_error:.4f} (standard error)" if self.images > 1 else ""
    images = f"{self.images:,} image{'s' * (self.images != 1)}"
    return f"{self.mean_bpb:.4f} bpb{spread} over " + (f"{self.tiles:,} tiles of {images}" if self.tiles else images)

  def as_json(self) -> dict[str, int | float | None]:
    """Returns what eval.json says of the images; `tiles` only where there are any."""
    values = {"images": self.images, "mean_bpb": self.mean_bpb, "standard_error": self.standard_error}
    return values | ({"tiles": self.tiles} if self.tiles else {})


def summarize_evaluation(data: DataConfig, source: Source, result: Evaluation) -> ImageSummary | None:
  """Summarises an evaluation of `source`; returns None where the data are not images, or none was scored whole."""
  if data.form != "image" or not (result.document_bytes == source.lengths).any():
    return None
  tiles = source.names if data.image_tiles else ()
  return summarize(result.document_nats, result.document_bytes, source.lengths, tiles)


def summarize(
  document_nats: np.ndarray, document_bytes: np.ndarray, lengths: np.ndarray, tiles: Sequence[str] = ()
) -> ImageSummary:
  """Summarises an evaluation over its wholly scored images.

  Args:
    document_nats: [documents], nats summed over each image.
    document_bytes: [documents], bytes scored of each image.
    lengths: [documents], bytes of each image. Images with fewer bytes scored are left out.
    tiles: names of the documents, if these are tiles of images.

  Raises:
    ValueError: no image was scored as a whole.
  """
  whole = np.flatnonzero(np.asarray(document_bytes) == lengths)
  if not len(whole):
    raise ValueError("not a single image was scored as a whole; score more bytes")
  bpb = np.asarray(document_nats, np.float64)[whole] / np.asarray(document_bytes)[whole] / np.log(2)
  order = np.argsort(bpb, kind="stable")
  names = [image_of(tiles[int(i)]) for i in whole] if tiles else np.arange(len(whole))
  image = np.unique(names, return_inverse=True)[1]
  sums = np.bincount(image, bpb - bpb.mean())  # one for each image
  n = len(sums)
  error = float(np.sqrt(n / (n - 1) * np.sum(sums**2)) / len(bpb)) if n > 1 else None
  return ImageSummary(n, len(whole) if tiles else 0, float(bpb.mean()), error, whole[order], bpb[order])


def write_best_and_worst(
  summary: ImageSummary, source: Source, data: DataConfig, folder: epath.PathLike, count: int = 16
) -> list[str]:
  """Writes images_best.png and images_worst.png into `folder`, the most extreme image first; returns their paths."""
  chosen = {"best": summary.ranked[:count], "worst": summary.ranked[::-1][:count]}
  paths = []
  for name, documents in chosen.items():
    shown = [
      patch_scan.bytes_to_image(source.read(int(i), 0, int(source.lengths[i])), data.scan, data.scan_patch)
      for i in documents
    ]
    width = max(1, min(8, len(shown), 2048 // shown[0].shape[1]))
    rows = [shown[i : i + width] for i in range(0, len(shown), width)]
    paths.append(os.path.join(os.fspath(folder), f"images_{name}.png"))
    pictures.write_png(paths[-1], pictures.image_grid(rows))
  return paths
