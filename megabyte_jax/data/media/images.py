"""Bytes <-> images: decoding, scaling, the patch scan and the raster scan, and pictures to look at."""

from __future__ import annotations

import functools
import io
import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data.sources import said
from megabyte_jax.errors import DataError, require
from megabyte_jax.files.atomic_file import replacing

if TYPE_CHECKING:
  from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP")
_PNG = b"\x89PNG\r\n\x1a\n"
# The end of a PNG's head: bits, RGB, the one compression, the one filtering, not interlaced.
_RGB8 = bytes((8, 2, 0, 0, 0))
_PLAIN = frozenset((b"IHDR", b"IDAT", b"IEND", b"bKGD", b"cHRM", b"eXIf", b"gAMA", b"iCCP", b"pHYs", b"sRGB", b"tIME"))
_SMALL = 1 << 20  # pixels
_TABLE = 1 << 14  # pixels of images whose patch scan is kept as a table of eight bytes a byte
_ALPHA, _GREY = ("RGBA", "LA", "PA", "RGBa", "La"), ("L", "1")
_GREY_IMAGE, _CMYK_IMAGE = "a grey image", "an image of colours CMYK"  # what decoders of three channels make RGB


def patch_side(scan_patch: int) -> int:
  """Pixels p on the side of a patch of P = 3 * p^2 bytes. Raises ConfigError where there is no such p."""
  p = math.isqrt(scan_patch // 3) if scan_patch > 0 else 0
  require(
    p > 0 and 3 * p * p == scan_patch,
    f"config.data.scan_patch is {scan_patch}; a patch scan needs 3 * p^2 bytes: 3, 12, 27, 48, 192, 768, ...",
  )
  return p


def image_to_bytes(image_HWC: np.ndarray, scan: str, scan_patch: int = 3) -> np.ndarray:
  """The bytes of an image in the order in which they are modelled.

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
  """Which byte of an image is the n-th of its patch scan. Looking this up is quicker than going there each time."""
  return np.arange(height * width * 3).reshape(height // p, p, width // p, p, 3).swapaxes(1, 2).reshape(-1)


def bytes_to_image(x: np.ndarray, scan: str, scan_patch: int = 3) -> np.ndarray:
  """The inverse of `image_to_bytes` for square images: uint8 [side, side, 3].

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
    chunks = _png_chunks(data) if data.startswith(_PNG) else []
    if plain := _plain_png(data, chunks):
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


def _png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
  """(kind, start, stop) of the contents of each chunk of a PNG file.

  Raises:
    ValueError: a checksum is wrong or the end is missing; Pillow decodes pixels without looking at their checksums.
  """
  place, kind, chunks = len(_PNG), b"", []
  while kind != b"IEND":
    start = place + 8
    stop = start + int.from_bytes(data[place : place + 4], "big")
    kind, crc = data[place + 4 : start], data[stop : stop + 4]
    if zlib.crc32(data[place + 4 : stop]) != int.from_bytes(crc, "big") or len(crc) != 4:
      raise ValueError(f"wrong checksum or end of file in the chunk at byte {place}")
    chunks.append((kind, start, stop))
    place = stop + 4
  return chunks


def _plain_png(data: bytes, chunks: list[tuple[bytes, int, int]]) -> Image.Image | None:
  """Decodes a small PNG of 8-bit RGB without alpha or animation; None for any other file.

  The pixels are those that `Image.open` gives, by the same decoder, without what it does in Python for each file, which
  is much for a small image and where threads wait for each other.
  """
  from PIL import Image  # noqa: PLC0415

  kinds = [kind for kind, _, _ in chunks]
  if kinds[:1] != [b"IHDR"] or not _PLAIN.issuperset(kinds):
    return None
  head = data[chunks[0][1] : chunks[0][2]]
  width, height = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
  if head[8:] != _RGB8 or not 0 < width * height <= _SMALL:
    return None
  pixels = b"".join(data[start:stop] for kind, start, stop in chunks if kind == b"IDAT")
  return Image.frombytes("RGB", (width, height), pixels, "zip", "RGB")


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


def square_image(image: Image.Image, size: int) -> np.ndarray:
  """The centred square of a Pillow image, uint8 [size, size, 3].

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
  """A Pillow image with its short side scaled to `short_side` (bicubic), uint8 [height, width, 3]."""
  from PIL import Image  # noqa: PLC0415

  size = scaled_size(image.size, short_side)
  return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
  """(width, height) after scaling the short side to `short_side` pixels."""
  short = min(size)
  width, height = (short_side if s == short else max(short_side, round(s * short_side / short)) for s in size)
  return width, height


def write_png(path: epath.PathLike, image_HWC: np.ndarray) -> None:
  """Writes a uint8 [height, width, 3] image; the file appears whole or not at all."""
  from PIL import Image  # noqa: PLC0415

  with replacing(path) as temporary, temporary.open("wb") as file:
    Image.fromarray(np.asarray(image_HWC, np.uint8)).save(file, format="PNG")


def write_document_png(path: epath.PathLike, x: np.ndarray, data: DataConfig) -> None:
  """Writes the bytes of one (evaluated or generated) image as the picture that they are under `data`."""
  write_png(path, bytes_to_image(x, data.scan, data.scan_patch))


def image_grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> np.ndarray:
  """Equally large uint8 [height, width, 3] images in rows on white, as one image."""
  height, width, _ = rows[0][0].shape
  columns = max(len(row) for row in rows)
  grid = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
  for i, row in enumerate(rows):
    for j, image in enumerate(row):
      top, left = gap + i * (height + gap), gap + j * (width + gap)
      grid[top : top + height, left : left + width] = image
  return grid
