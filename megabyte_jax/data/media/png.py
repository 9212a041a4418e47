"""Checks PNG files chunk by chunk, and decodes small plain ones quickly."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The end of a PNG's head: bits, RGB, the one compression, the one filtering, not interlaced.
_RGB8 = bytes((8, 2, 0, 0, 0))
_PLAIN = frozenset((b"IHDR", b"IDAT", b"IEND", b"bKGD", b"cHRM", b"eXIf", b"gAMA", b"iCCP", b"pHYs", b"sRGB", b"tIME"))
_SMALL = 1 << 20  # pixels
_PALETTE = b"\x03"  # the type of colours of an image that has a palette


def chunks_of(data: bytes) -> list[tuple[bytes, int, int]]:
  """Returns (kind, start, stop) of the contents of each chunk of a PNG file.

  Raises:
    ValueError: a checksum is wrong, or the end or the palette is missing; Pillow decodes pixels without looking at
      their checksums, and takes an image without its palette for a grey one.
  """
  place, kind, chunks = len(SIGNATURE), b"", []
  while kind != b"IEND":
    start = place + 8
    stop = start + int.from_bytes(data[place : place + 4], "big")
    kind, crc = data[place + 4 : start], data[stop : stop + 4]
    if zlib.crc32(data[place + 4 : stop]) != int.from_bytes(crc, "big") or len(crc) != 4:
      raise ValueError(f"wrong checksum or end of file in the chunk at byte {place}")
    chunks.append((kind, start, stop))
    place = stop + 4
  if data[25:26] == _PALETTE and all(kind != b"PLTE" for kind, _, _ in chunks):
    raise ValueError("its palette is missing")
  return chunks


def decode_plain(data: bytes, chunks: list[tuple[bytes, int, int]], max_pixels: int) -> Image.Image | None:
  """Decodes a small PNG of 8-bit RGB without alpha or animation; None for any other, or a larger one.

  The pixels are those that `Image.open` gives, by the same decoder, without what it does in Python for each file, which
  is much for a small image and where threads wait for each other.
  """
  from PIL import Image  # noqa: PLC0415

  kinds = [kind for kind, _, _ in chunks]
  if kinds[:1] != [b"IHDR"] or not _PLAIN.issuperset(kinds):
    return None
  head = data[chunks[0][1] : chunks[0][2]]
  width, height = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big")
  if head[8:] != _RGB8 or not 0 < width * height <= min(_SMALL, max_pixels):
    return None
  pixels = b"".join(data[start:stop] for kind, start, stop in chunks if kind == b"IDAT")
  return Image.frombytes("RGB", (width, height), pixels, "zip", "RGB")
