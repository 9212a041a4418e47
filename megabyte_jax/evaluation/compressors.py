"""Measures general-purpose compressors on the same bytes, as a yardstick for a model's bits per byte."""

from __future__ import annotations

import bz2
import dataclasses
import lzma
import zlib
from collections.abc import Callable

# The same algorithms and levels as the command-line tools, without their file headers of a few bytes.
COMPRESSORS: dict[str, Callable[[bytes], int]] = {
  "gzip -9": lambda data: len(zlib.compress(data, 9)),
  "bzip2 -9": lambda data: len(bz2.compress(data, 9)),
  "xz -9e": lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
}


@dataclasses.dataclass(frozen=True)
class Compressed:
  """Bits per byte of one compressor.

  Attributes:
    alone: for the data alone.
    primed: for the data after the training text, whose own size is subtracted; None without a training text, and for
      so few bytes that the two sizes do not differ. gzip sees only its last 32 kB, bzip2 its last 900 kB.
  """

  alone: float
  primed: float | None


def compress_all(data: bytes, primer: bytes | None = None) -> dict[str, Compressed]:
  """Returns the bits per byte of each compressor, by name, for `data` alone and after `primer`."""
  results = {}
  for name, size in COMPRESSORS.items():
    bits = 8 / len(data)
    more = size(primer + data) - size(primer) if primer else 0
    results[name] = Compressed(size(data) * bits, more * bits if more > 0 else None)
  return results
