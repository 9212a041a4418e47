"""Writes images as pictures to look at, one by one or in a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data.media.patch_scan import bytes_to_image
from megabyte_jax.files.atomic_file import replacing


def write_png(path: epath.PathLike, image_HWC: np.ndarray) -> None:
  """Writes a uint8 [height, width, 3] image; the file appears whole or not at all."""
  from PIL import Image  # noqa: PLC0415

  with replacing(path) as temporary, temporary.open("wb") as file:
    Image.fromarray(np.asarray(image_HWC, np.uint8)).save(file, format="PNG")


def write_document_png(path: epath.PathLike, x: np.ndarray, data: DataConfig) -> None:
  """Writes the bytes of one (evaluated or generated) image as the picture that they are under `data`."""
  write_png(path, bytes_to_image(x, data.scan, data.scan_patch))


def image_grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> np.ndarray:
  """Puts equally large uint8 [height, width, 3] images in rows on white and returns that as one image."""
  height, width, _ = rows[0][0].shape
  columns = max(len(row) for row in rows)
  grid = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
  for i, row in enumerate(rows):
    for j, image in enumerate(row):
      top, left = gap + i * (height + gap), gap + j * (width + gap)
      grid[top : top + height, left : left + width] = image
  return grid
