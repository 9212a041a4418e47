"""Turns images into bytes and back: the patch scan (section D.1 of the paper) and the raster scan."""

from __future__ import annotations

import functools
import math

import numpy as np

from megabyte_jax.errors import DataError, require

_TABLE = 1 << 14  # pixels of images whose patch scan is kept as a table of eight bytes a byte


def patch_side(scan_patch: int) -> int:
  """Returns the pixels p on the side of a patch of P = 3 * p^2 bytes. Raises ConfigError where there is no such p."""
  p = math.isqrt(scan_patch // 3) if scan_patch > 0 else 0
  require(
    p > 0 and 3 * p * p == scan_patch,
    f"config.data.scan_patch is {scan_patch}; a patch scan needs 3 * p^2 bytes: 3, 12, 27, 48, 192, 768, ...",
  )
  return p


def image_to_bytes(image_HWC: np.ndarray, scan: str, scan_patch: int = 3) -> np.ndarray:
  """Returns the bytes of an image in the order in which they are modelled.

  raster: row after row, each pixel as red, green, blue. patch (section D.1 of the paper): the image is cut into
  p x p patches, P = 3 * p^2; patches go row after row, and so do the pixels of a patch. So a patch of the model is a
  square of the image.

  Args:
    image_HWC: uint8 [height, width, 3].
    scan: patch | raster.
    scan_patch: P; p must divide height and width. Not looked at in a raster scan.

  Returns:
    uint8 [height * width * 3].
  """
  height, width, _ = image_HWC.shape
  if scan == "raster":
    return np.ascontiguousarray(image_HWC).reshape(-1)
  p = _fitting_side(scan_patch, height, width)
  if height * width <= _TABLE:
    return np.ascontiguousarray(image_HWC).reshape(-1).take(_patch_scan(height, width, p))
  return image_HWC.reshape(height // p, p, width // p, p, 3).swapaxes(1, 2).reshape(-1)


@functools.lru_cache(maxsize=16)
def _patch_scan(height: int, width: int, p: int) -> np.ndarray:
  """Returns which byte of an image is the n-th of its patch scan: a look-up is quicker than going there each time."""
  return np.arange(height * width * 3).reshape(height // p, p, width // p, p, 3).swapaxes(1, 2).reshape(-1)


def bytes_to_image(x: np.ndarray, scan: str, scan_patch: int = 3) -> np.ndarray:
  """Inverts `image_to_bytes` for square images; returns uint8 [side, side, 3].

  Raises:
    DataError: the number of bytes is not that of such an image.
  """
  x = np.asarray(x, np.uint8)
  side = math.isqrt(x.size // 3)
  if x.size != side * side * 3 or not x.size:
    raise DataError(f"{x.size:,} bytes are no {side} x {side} image of 3 bytes a pixel")
  if scan == "raster":
    return x.reshape(side, side, 3)
  p = _fitting_side(scan_patch, side, side)
  return x.reshape(side // p, side // p, p, p, 3).swapaxes(1, 2).reshape(side, side, 3)


def _fitting_side(scan_patch: int, height: int, width: int) -> int:
  p = patch_side(scan_patch)
  require(
    height % p == 0 and width % p == 0,
    f"patches of {p} x {p} pixels (config.data.scan_patch={scan_patch}) do not tile an image of {height} x {width}",
  )
  return p
