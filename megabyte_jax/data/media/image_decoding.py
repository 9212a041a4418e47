"""Decodes image files to 8-bit RGB, and says what keeps others from it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from megabyte_jax.data.media import png
from megabyte_jax.data.sources import said
from megabyte_jax.errors import DataError

if TYPE_CHECKING:
  from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP")
_ALPHA, _GREY = ("RGBA", "LA", "PA", "RGBa", "La"), ("L", "1")
_GREY_IMAGE, _CMYK_IMAGE = "a grey image", "an image of colours CMYK"  # what decoders of three channels make RGB


def open_image(data: bytes, name: str, convert: str = "", remedy: str = "") -> Image.Image:
  """Decodes a JPEG, PNG or WebP file to a Pillow image of mode RGB, in the file's own size.

  EXIF orientation is not applied, as TFDS does not. What is not plain 8-bit RGB is an error unless `convert` allows it.
  A palette without transparency is plain RGB.

  Args:
    data: the file.
    name: of the item, for errors.
    convert: "colours" repeats grey over the three channels and turns CMYK to RGB by Pillow's formula; "all" also drops
      alpha and keeps the upper 8 of 16 bits.
    remedy: what may be done about any item that is refused.

  Raises:
    DataError: names the item, what is wrong with it, and remedies.
  """
  from PIL import Image  # noqa: PLC0415

  try:
    chunks = png.chunks_of(data) if data.startswith(png.SIGNATURE) else []
    if plain := png.decode_plain(data, chunks):
      return plain
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      animated = image.format != "JPEG" and getattr(image, "is_animated", False)
      image.load()
  except Exception as error:  # decoders of damaged files raise nearly everything
    problem = f"{name} is not a whole JPEG, PNG or WebP image ({said(error)})"
    raise DataError("; ".join(filter(None, (problem, remedy)))) from error
  odd = _oddity(image, data) or ("an animation" if animated else "")
  fine = convert == "all" or (convert == "colours" and odd in (_GREY_IMAGE, _CMYK_IMAGE))
  if odd and (animated or not fine):
    convertible = "" if animated else "make it RGB with --config.data.convert_images=True (eval.py: --convert-images)"
    remedies = ", or ".join(filter(None, (remedy, convertible)))
    raise DataError(f"{name} is {odd}, not an 8-bit RGB image{remedies and '; ' + remedies}")
  if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # grey of 16 bits
    upper = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    return Image.fromarray(upper).convert("RGB")
  return image if image.mode == "RGB" else image.convert("RGB")


def _oddity(image: Image.Image, data: bytes) -> str:
  """What keeps an image from being 8-bit RGB; empty if nothing does."""
  sixteen_bits = image.format == "PNG" and data[24] == 16  # Pillow shows 16-bit RGB as RGB
  if sixteen_bits or image.mode.startswith(("I", "F")):
    return "an image of 16 bits a channel"
  if image.mode in _ALPHA or (image.mode in ("P", "RGB", "L") and "transparency" in image.info):
    return "an image with alpha"
  if image.mode in _GREY:
    return _GREY_IMAGE
  return "" if image.mode in ("RGB", "P") else f"an image of colours {image.mode}"
