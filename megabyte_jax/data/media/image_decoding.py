"""Decodes image files to 8-bit RGB, and says what keeps others from it."""

from __future__ import annotations

import functools
import io
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from megabyte_jax.data.folders import ARRAYS_HINT
from megabyte_jax.data.media import png
from megabyte_jax.data.sources import said
from megabyte_jax.errors import DataError

if TYPE_CHECKING:
  from PIL import Image

SUFFIXES = (
  ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif",
)  # fmt: skip
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
_KINDS = "JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF"
_ARRAYS = {b"PK\3\4": "a zip or .npz file", b"\x93NUMPY": "NumPy's .npy file"}  # by their first bytes
_ARRAYS |= {bytes([0x80, protocol]): "a pickle" for protocol in (2, 3, 4, 5)}
MAX_PIXELS = 178_956_970  # Pillow's own limit, against small files that fill the memory
_ALPHA, _GREY = ("RGBA", "LA", "PA", "RGBa", "La"), ("L", "1")
_GREY_IMAGE, _CMYK_IMAGE = "a grey image", "an image of colours CMYK"  # what decoders of three channels make RGB
_WIDE, _SEVERAL = "an image of 32 bits a channel", ("an animation", "a file of several pages")  # never converted
_BITS, _SUBFILE = 258, 254  # tags of TIFF


def open_image(
  data: bytes, name: str, convert: str = "", remedy: str = "", max_pixels: int = MAX_PIXELS
) -> Image.Image:
  """Decodes an image file to a Pillow image of mode RGB, in the file's own size.

  EXIF orientation is not applied, as TFDS does not. What is not plain 8-bit RGB is an error unless `convert` allows it.
  A palette without transparency is plain RGB. Of an MPO, a JPEG with further pictures behind it, the first is taken;
  so it is of a TIFF whose other pages are masks or smaller copies.

  Args:
    data: the file.
    name: of the item, for errors.
    convert: "colours" repeats grey over the three channels and turns CMYK to RGB by Pillow's formula; "all" also drops
      alpha and keeps the upper 8 of 16 bits.
    remedy: what may be done about any item that is refused.
    max_pixels: more are refused before they are decoded.

  Raises:
    DataError: names the item, what is wrong with it, and remedies.
  """

  try:
    chunks = png.chunks_of(data) if data.startswith(png.SIGNATURE) else []
    if plain := png.decode_plain(data, chunks, max_pixels):
      return plain
    with _opened(data, name, remedy, max_pixels) as image:
      odd = _several(image)
      image.load()
      odd = odd or _oddity(image, data)
    if not odd:
      return image if image.mode == "RGB" else image.convert("RGB")
    convertible = odd not in (*_SEVERAL, _WIDE)
    if convertible and (convert == "all" or (convert == "colours" and odd in (_GREY_IMAGE, _CMYK_IMAGE))):
      return _to_rgb(image)
  except DataError:
    raise
  except Exception as error:  # decoders of damaged files raise nearly everything
    raise _unreadable(name, data, error, remedy) from error
  flags = "--config.data.convert_images=True (eval.py and prepare: --convert-images)"
  make_rgb = f"make it RGB with {flags}" if convertible else ""
  remedies = ", or ".join(filter(None, (remedy, make_rgb)))
  raise DataError(f"{name} is {odd}, not an 8-bit RGB image{remedies and '; ' + remedies}")


def read_size(data: bytes, name: str, remedy: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """Reads (width, height) from the head of an image file. Raises DataError as `open_image` does."""
  try:
    with _opened(data, name, remedy, max_pixels) as image:
      return image.size
  except DataError:
    raise
  except Exception as error:  # see open_image
    raise _unreadable(name, data, error, remedy) from error


def _unreadable(name: str, data: bytes, error: Exception, remedy: str) -> DataError:
  if what := next((what for begins, what in _ARRAYS.items() if data.startswith(begins)), ""):
    return DataError("; ".join(filter(None, (f"{name} is {what}, not an image; {ARRAYS_HINT}", remedy))))
  return DataError("; ".join(filter(None, (f"{name} is not a whole {_KINDS} image ({said(error)})", remedy))))


def _opened(data: bytes, name: str, remedy: str, max_pixels: int) -> Image.Image:
  """The head of an image, its pixels not decoded yet. Raises DataError where there are too many of them."""
  from PIL import Image  # noqa: PLC0415

  formats = _formats()
  if Image.MAX_IMAGE_PIXELS and max_pixels // 2 > Image.MAX_IMAGE_PIXELS:
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice as many; below, the limit is the caller's own
  try:
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    too_large = f"{width:,} x {height:,} pixels are more than" if width * height > max_pixels else ""
  except Image.DecompressionBombError as error:
    found = re.search(r"\d+", str(error))  # "Image size (200000000 pixels) exceeds limit of ..."
    too_large = f"{int(found[0]) if found else 0:,} pixels are more than"
  if not too_large:
    return image
  trusted = "where you trust the data, raise that (eval.py and prepare: --max-pixels)"
  text = f"{name} is too large: {too_large} config.data.max_pixels={max_pixels}"
  raise DataError("; ".join(filter(None, (text, trusted, remedy))))


@functools.cache
def _formats() -> tuple[str, ...]:
  """Those of `_FORMATS` that this Pillow has."""
  from PIL import Image  # noqa: PLC0415

  Image.init()
  # What its decoders warn of is damage that ends in an error of ours, or does not matter.
  warnings.filterwarnings("ignore", module=r"PIL\.")
  return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def _several(image: Image.Image) -> str:
  """Says what several pictures in one file are; empty where there is one, or only one that counts."""
  if image.format in ("JPEG", "MPO") or not getattr(image, "is_animated", False):
    return ""
  if image.format != "TIFF":
    return _SEVERAL[0]
  pages = 0
  for page in range(image.n_frames):  # type: ignore[attr-defined]
    image.seek(page)
    pages += not int(image.tag_v2.get(_SUBFILE, 0)) & 5  # type: ignore[attr-defined]  # 1: smaller copy, 4: mask
  image.seek(0)
  return _SEVERAL[1] if pages > 1 else ""


def _oddity(image: Image.Image, data: bytes) -> str:
  """Says what keeps an image from being 8-bit RGB; empty if nothing does."""
  bits = _bits(image, data)
  if bits > 16 or image.mode == "F":
    return _WIDE
  if bits > 8 or image.mode.startswith("I"):
    return "an image of 16 bits a channel"
  if image.mode in _ALPHA or (image.mode in ("P", "RGB", "L") and "transparency" in image.info):
    return "an image with alpha"
  if image.mode in _GREY:
    return _GREY_IMAGE
  return "" if image.mode in ("RGB", "P") else f"an image of colours {image.mode}"


def _bits(image: Image.Image, data: bytes) -> int:
  """Bits a channel in the file: of more than 8, Pillow shows RGB as if it had 8."""
  if image.format == "PNG":
    return data[24]
  if image.format == "TIFF":
    bits = image.tag_v2.get(_BITS, 1)  # type: ignore[attr-defined]
    return max(bits) if isinstance(bits, tuple) else int(bits)
  if image.format == "AVIF":  # AV1 Codec ISO Media File Format Binding, 2.3.3: high_bitdepth
    place = data.find(b"av1C")
    return 16 if place >= 0 and data[place + 6 : place + 7] > b"\x3f" and data[place + 6] & 0x40 else 8
  return 8


def _to_rgb(image: Image.Image) -> Image.Image:
  from PIL import Image  # noqa: PLC0415

  if image.mode.startswith("I"):  # grey of 16 bits
    upper = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    return Image.fromarray(upper).convert("RGB")
  return image if image.mode == "RGB" else image.convert("RGB")
