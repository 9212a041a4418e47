"""Makes images documents, which are decoded, scaled and scanned when they are read."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import fingerprint_files, read_whole, sizes_of
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.media import image_decoding, image_scaling, patch_scan
from megabyte_jax.data.media.encoded_media import EncodedMedia
from megabyte_jax.data.shared_cache import DOCUMENT_BYTES, SharedCache, array_bytes
from megabyte_jax.data.sources import SKIP_HINT, Joined, Source, check_range, evenly_spaced
from megabyte_jax.errors import DataError, require

if TYPE_CHECKING:
  from PIL import Image

_REMEDY = (
  f"remove it before a run begins, or skip and count all such images with {SKIP_HINT}, also in a run that has begun"
)
_SIZES_OF = 16  # images of a source whose sizes are looked at
_TILE_BYTES = DOCUMENT_BYTES >> 2  # that are kept as documents: cutting one from an image that is kept takes little


class ImageFiles:
  """Image files, one image each."""

  skipped = 0

  def __init__(self, paths: Sequence[str], names: Sequence[str]):
    self.paths, self.names = paths, names

  @functools.cached_property
  def fingerprint(self) -> str:
    """See `fingerprint_files`."""
    return fingerprint_files(self.paths, self.names, sizes_of(self.paths))

  def load(self, i: int) -> bytes:
    """Reads a file; see `EncodedMedia`."""
    return read_whole(self.paths[i])

  def place(self, i: int) -> str:
    """Returns its path; see `EncodedMedia`."""
    return self.paths[i]


class Images:
  """One document per image, or per tile of an image, of image_size^2 * 3 bytes, in the order of the scan.

  With data.image_tiles = 0 an image gives its centred square (`image_scaling.square_image`). Otherwise its short side
  is scaled to image_tiles pixels and it is cut into as many squares as fit side by side from the top left corner.

  Args:
    encoded: where the images are.
    data: size, scan and what to do with odd or bad images. With skip_bad every image is decoded once at the start;
      unreadable ones are left out and counted in `skipped`, beside those that `encoded` has left out.
    convert: what is made RGB (see `image_decoding.open_image`) where data.convert_images does not ask for all.
  """

  joinable, unit, slow = False, 1, True

  def __init__(self, encoded: EncodedMedia, data: DataConfig, convert: str = ""):
    if data.scan == "patch":
      p = patch_scan.patch_side(data.scan_patch)
      require(
        data.image_size % p == 0,
        f"config.data.image_size {data.image_size} is not a multiple of the {p} pixels of a patch "
        f"(config.data.scan_patch={data.scan_patch})",
      )
    require(
      data.image_tiles == 0 or data.image_tiles >= data.image_size,
      f"config.data.image_tiles {data.image_tiles} is smaller than image_size {data.image_size}",
    )
    self.encoded, self.data, self.convert = encoded, data, "all" if data.convert_images else convert
    self.skipped = encoded.skipped
    self._scaled = SharedCache(self._scale, DOCUMENT_BYTES, array_bytes)
    self._documents = SharedCache(self._document, _TILE_BYTES if data.image_tiles else DOCUMENT_BYTES, array_bytes)
    good = self._good_images() if data.skip_bad else range(len(encoded.names))
    self._image: Sequence[int] = good  # of each document
    self._places: list[tuple[int, int]] = []  # (top, left) of each document where tiles are cut
    self.names = encoded.names
    if data.image_tiles:
      self._place_tiles(good)
    elif len(good) < len(encoded.names):
      self.names = [encoded.names[i] for i in good]
    self.lengths = np.full(len(self.names), data.image_size**2 * 3, np.int64)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the images and with how they are turned into bytes."""
    d = self.data
    how = (d.image_size, d.image_tiles, d.scan, d.scan_patch if d.scan == "patch" else 0, self.convert)
    return combine_fingerprints([self.encoded.fingerprint, repr(how)])

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Reads bytes; see `Source`. Raises DataError naming an image that cannot be decoded."""
    check_range(self, document, start, stop)
    return self._documents(document)[start:stop].copy()

  def _document(self, document: int) -> np.ndarray:
    """The bytes of a document."""
    i, d = self._image[document], self.data
    if not self._places:
      square = image_scaling.square_image(self._open(i), d.image_size)
    else:
      top, left = self._places[document]
      square = self._scaled(i)[top : top + d.image_size, left : left + d.image_size]
    return patch_scan.image_to_bytes(square, d.scan, d.scan_patch)

  def _scale(self, i: int) -> np.ndarray:
    """An image from which tiles are cut."""
    return image_scaling.scaled_image(self._open(i), self.data.image_tiles)

  def _open(self, i: int) -> Image.Image:
    data, place = self.encoded.load(i), self.encoded.place(i)
    return image_decoding.open_image(data, place, self.convert, _REMEDY, self.data.max_pixels)

  def _size(self, i: int) -> tuple[int, int]:
    return image_decoding.read_size(self.encoded.load(i), self.encoded.place(i), _REMEDY, self.data.max_pixels)

  def sizes_of_some(self) -> list[tuple[int, int]]:
    """Returns (width, height) of some images, evenly spaced, without those that cannot be read."""
    found = []
    for k in evenly_spaced(len(self._image), _SIZES_OF):
      with contextlib.suppress(DataError):  # said where the image is decoded
        found.append(self._size(self._image[k]))
    return found

  def _scaled_size(self, i: int) -> tuple[int, int]:
    """(width, height) of an image from which tiles are cut. Raises DataError where they are too many pixels."""
    tiles, most = self.data.image_tiles, max(self.data.max_pixels, image_decoding.MAX_PIXELS)
    width, height = image_scaling.scaled_size(self._size(i), tiles)
    if width * height > most:
      raise DataError(
        f"{self.encoded.place(i)} is too large: scaled by config.data.image_tiles={tiles} it has "
        f"{width:,} x {height:,} pixels, more than {most}; take fewer image_tiles, raise config.data.max_pixels, or "
        f"{_REMEDY}"
      )
    return width, height

  def _good_images(self) -> list[int]:
    count = len(self.encoded.names)
    with ThreadPoolExecutor() as pool:
      is_good = list(pool.map(self._is_good, range(count)))
    good = [i for i in range(count) if is_good[i]]
    if not good:
      raise DataError(f"none of {count} images can be read, {self.encoded.place(0)} for one")
    self.skipped += count - len(good)
    self.skipped_names = [self.encoded.names[i] for i in range(count) if not is_good[i]]
    return good

  def _is_good(self, i: int) -> bool:
    try:
      self._open(i)
      if self.data.image_tiles:
        self._scaled_size(i)
    except DataError:
      return False
    return True

  def _place_tiles(self, good: Sequence[int]) -> None:
    n = self.data.image_size
    numbers, names = [], []
    for i in good:
      width, height = self._scaled_size(i)
      for row, column in np.ndindex(height // n, width // n):
        numbers.append(i)
        self._places.append((row * n, column * n))
        names.append(f"{self.encoded.names[i]}[{row},{column}]")  # image_of knows this
    self._image, self.names = numbers, names


def notice_of_scaling(source: Source) -> str:
  """Says that images of other sizes are scaled; '' where none of some that are looked at is, or tiles are cut."""
  parts = source.sources if isinstance(source, Joined) else [source]
  images = [part for part in parts if isinstance(part, Images) and not part.data.image_tiles]
  sizes = [size for part in images for size in part.sizes_of_some()]
  n = images[0].data.image_size if images else 0
  if not (other := [size for size in sizes if size != (n, n)]):
    return ""
  enlarged = sum(min(size) < n for size in other)
  return (
    f"scaled or cut to {n} x {n} pixels: {len(other)} of {len(sizes)} image{'s' * (len(sizes) != 1)} looked at"
    f"{f' ({enlarged} enlarged)' if enlarged else ''}; compare bits per byte only with those of images scaled alike"
  )


def centred_square(data: bytes, name: str, config: DataConfig) -> np.ndarray:
  """Returns the bytes of the centred square of an encoded image, which is made RGB; also where training cuts tiles.

  Raises:
    DataError: it cannot be decoded.
  """
  square = image_scaling.square_image(
    image_decoding.open_image(data, name, "all", max_pixels=config.max_pixels), config.image_size
  )
  return patch_scan.image_to_bytes(square, config.scan, config.scan_patch)


def image_of(tile: str) -> str:
  """Returns the name of the image that a tile of this name was cut from."""
  return tile.rpartition("[")[0]
