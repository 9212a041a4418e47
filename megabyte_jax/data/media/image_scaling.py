"""Scales images and cuts squares from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from PIL import Image


def square_image(image: Image.Image, size: int) -> np.ndarray:
  """Returns the centred square of a Pillow image, uint8 [size, size, 3].

  The short side is scaled to `size` pixels by Pillow's bicubic filter (which averages when it makes smaller), and the
  middle of the long side is kept, in one resampling. An image that has this size already is left untouched.
  """
  from PIL import Image  # noqa: PLC0415

  if image.size != (size, size):
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
  return np.asarray(image)


def scaled_image(image: Image.Image, short_side: int) -> np.ndarray:
  """Returns a Pillow image with its short side scaled to `short_side` (bicubic), uint8 [height, width, 3]."""
  from PIL import Image  # noqa: PLC0415

  size = scaled_size(image.size, short_side)
  return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
  """Returns (width, height) after scaling the short side to `short_side` pixels."""
  short = min(size)
  width, height = (short_side if s == short else max(short_side, round(s * short_side / short)) for s in size)
  return width, height
