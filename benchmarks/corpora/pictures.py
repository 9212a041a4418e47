"""Photographs out of packages: wallpapers, puzzles, and the pictures in a Qt resource file."""

from __future__ import annotations

import hashlib
import io
import pathlib
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from packages import files
from PIL import Image

_MATE = "{Aqua,Blinds,Dune,FreshFlower,Garden,GreenMeadow,LadyBird,RainDrops,Storm,TwoWings,Wood,YellowFlower}.jpg"
_LXQT = (
  "{Butterfly-Kenneth-Wimer.jpg,Valendas.png,after-the-rain.jpg,appleflower.png,beam.png,butterfly.png,cloud.png,"
  "drop.png,flowers.png,fog.jpg,this-is-not-windows.jpg}"
)
_PLASMA = (
  "{BytheWater,ColorfulCups,ColdRipple,DarkestHour,EveningGlow,FallenLeaf,Grey,Kite,OneStandsOut,Path,summer_1am}"
)


def _each(pattern: str) -> list[str]:
  """The patterns that one with {a,b,c} stands for."""
  before, _, rest = pattern.partition("{")
  choices, _, after = rest.partition("}")
  return [f"{before}{choice}{after}" for choice in choices.split(",")]


# Photographs among the pictures of each Debian package; the rest are drawings.
PACKAGES = {
  "lomiri-wallpapers-16.04": ["*.jpg"],
  "lomiri-wallpapers-20.04": ["*/Kleiber*.jpg"],
  "mate-backgrounds": _each(f"*/nature/{_MATE}"),
  "lxqt-themes": _each(f"*/wallpapers/{_LXQT}"),
  "plasma-workspace-wallpapers": _each(f"*/wallpapers/{_PLASMA}/contents/images/*"),
  "palapeli-data": _each("*/{castle,cincinnati,citrus,european,panther}*.jpg"),
}
_PAINTINGS = ("paint", "Gogh", "Gauguin", "Bruegel", "lady_uni", "Bosschaert", "van_gogh")
_PAINTING_MD5S = ("dc40f936", "fd5cf7ee")
_UNWANTED = "umang_by"  # unclear origin
_SAME = 40  # of 256 bits: pictures that differ in fewer are copies in another size

Image.MAX_IMAGE_PIXELS = None


def photographs(found: Iterator[tuple[str, str, bytes]]) -> Iterator[tuple[str, bytes]]:
  """Yields (file name, contents) of the photographs among (package, path, contents), the largest copy of each."""
  pictures = []
  for package, path, contents in found:
    if _UNWANTED not in path:
      with Image.open(io.BytesIO(contents)) as image:
        pictures.append((-min(image.size), package, path, contents))
  kept: list[np.ndarray] = []
  for _, package, path, contents in sorted(pictures, key=lambda picture: picture[:3]):
    digest = hashlib.md5(contents).hexdigest()[:8]
    bits = _difference_hash(contents)
    if digest in _PAINTING_MD5S or any((bits != other).sum() <= _SAME for other in kept):
      continue
    kept.append(bits)
    yield f"{package}_{digest}{pathlib.Path(path).suffix}", contents


def _difference_hash(contents: bytes) -> np.ndarray:
  """256 bits: whether it gets brighter to the right, on a 16 x 16 grid."""
  with Image.open(io.BytesIO(contents)) as image:
    small = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX)).astype(int)
  return (small[:, 1:] > small[:, :-1]).ravel()


def gcompris(package: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Yields (path, contents) of the photographs among GCompris's WebP pictures, told from drawings by their colours."""
  for name, resources in files(package, ["*.rcc"]):
    for path, contents in resource_files(resources):
      if path.endswith(".webp") and not any(word in path for word in _PAINTINGS) and _looks_photographic(contents):
        yield f"{pathlib.Path(name).stem}{path}", contents


def _looks_photographic(contents: bytes) -> bool:
  """Many different colours, and few neighbours that are exactly the same."""
  with Image.open(io.BytesIO(contents)) as image:
    if image.mode != "RGB" or min(image.size) < 64:
      return False
    small = np.asarray(image.resize((128, 128), Image.Resampling.BOX)).astype(int)
  colours = len(np.unique((small // 8).reshape(-1, 3), axis=0))
  flat = (np.abs(np.diff(small, axis=1)).sum(axis=-1) == 0).mean()
  return colours > 600 and flat < 0.1


def resource_files(data: bytes) -> Iterator[tuple[str, bytes]]:
  """Yields (path, contents) of the files in a Qt resource file (.rcc, versions 1 to 3, stored or zlib).

  It has three parts: a tree of fixed-size nodes, a list of names, and the contents, each with its length before it.
  """
  if data[:4] != b"qres":
    return
  version, tree, contents, names = struct.unpack(">4I", data[4:20])
  node_size = 14 if version == 1 else 22  # later versions add a time

  def walk(number: int, folder: str) -> Iterator[tuple[str, bytes]]:
    name_at, flags, first, second = struct.unpack_from(">IHII", data, tree + number * node_size)
    path = folder
    if number:
      (length,) = struct.unpack_from(">H", data, names + name_at)
      start = names + name_at + 6  # past the length and a hash
      path = f"{folder}/{data[start : start + 2 * length].decode('utf-16-be')}"
    if flags & 2:  # a folder: `first` children from node `second` on
      for child in range(second, second + first):
        yield from walk(child, path)
      return
    (where,) = struct.unpack_from(">I", data, tree + number * node_size + 10)
    (size,) = struct.unpack_from(">I", data, contents + where)
    packed = data[contents + where + 4 : contents + where + 4 + size]
    if flags & 4:  # zstd, which no version met so far uses
      return
    yield path, zlib.decompress(packed[4:]) if flags & 1 else packed

  yield from walk(0, "")
