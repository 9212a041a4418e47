"""Reads packed folders: all documents in one file, ready to be read at any place.

  data.bin       the bytes of all documents, one after the other
  ends.npy       int64 [documents], where each ends in data.bin
  names.txt      one name a line
  manifest.json  sizes, checksums, where the bytes come from and how they were made

A folder appears under its name only when it is complete. Until then it is called NAME.part, and the same command
continues it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import ByteFiles, read_whole, sizes_of
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.sources import check_range
from megabyte_jax.errors import DataError, require
from megabyte_jax.files.json_files import read_json

FORMAT = "megabyte_jax packed bytes 1"
PART = ".part"  # ends the name of a folder that is not complete
MANIFEST = "manifest.json"
_DATA, _ENDS, _NAMES = FILES = ("data.bin", "ends.npy", "names.txt")  # those with a checksum
_BLOCK = 1 << 22  # bytes read at once for a checksum
_KEYS = {"bytes": int, "documents": int, "skipped": int, "unit": int, "settings": dict, "request": dict, "sha256": dict}
# Settings that change the bytes, by form of data: a folder packed with others is refused.
_SETTINGS = {
  "bytes": (),
  "image": ("image_size", "image_tiles", "convert_images", "scan", "scan_patch"),
  "audio": ("sample_rate", "encoding"),
}


def settings_of(data: DataConfig) -> dict[str, Any]:
  """Returns the settings under which `data` turns items into bytes, as the manifest records them."""
  return {"form": data.form, **{name: getattr(data, name) for name in _SETTINGS[data.form]}}


def is_packed(path: epath.PathLike) -> bool:
  """Returns True if a folder holds packed data. Raises DataError for an incomplete one: its files are not documents."""
  folder = epath.Path(path)
  if (folder / MANIFEST).exists() and not str(path).rstrip("/").endswith(PART) and _is_ours(folder):
    return True
  if (folder / "data.bin").exists() and any((folder / name).exists() for name in ("ends", "ends.npy")):
    raise DataError(
      f"{path} is packed data that are not complete ({MANIFEST} is missing, or it is still being made); run the "
      "command that packs it once more"
    )
  return False


def _is_ours(folder: epath.Path) -> bool:
  """Returns False where a folder merely has a manifest.json, as those of many programs have."""
  if any((folder / name).exists() for name in ("data.bin", "ends.npy")):
    return True
  with contextlib.suppress(OSError):
    return b"megabyte_jax packed" in (folder / MANIFEST).read_bytes()
  return True  # said when it is read


class Packed:
  """The source of a packed folder.

  Raises:
    ConfigError: `data` asks for other bytes (another image size, say) than were packed.
    DataError: a file is missing, or has another size than the manifest says.
  """

  def __init__(self, path: epath.PathLike, data: DataConfig):
    folder = epath.Path(path)
    self.manifest = read_manifest(folder)
    for name, value in settings_of(data).items():
      packed = self.manifest["settings"].get(name)
      require(packed == value, f"{path} was packed with {name}={packed!r}; config.data.{name} is {value!r}")
    ends, digest = _read_ends(folder, self.manifest)
    self._bytes = ByteFiles([str(folder / _DATA)], [_DATA])
    self._folder = folder
    self._starts = np.concatenate([[0], ends[:-1]])
    self.lengths = np.diff(ends, prepend=0).astype(np.int64)
    self.slow = self._bytes.slow
    self.joinable = data.form != "image"
    self.unit = self.manifest["unit"]
    self.skipped = self.manifest["skipped"]
    self.fingerprint = combine_fingerprints([self._bytes.fingerprint, digest, self.manifest["sha256"].get(_DATA)])

  @functools.cached_property
  def names(self) -> Sequence[str]:
    """One name per document. Raises DataError where they are not there."""
    return _read_names(self._folder / _NAMES, len(self.lengths))

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Reads bytes as `Source.read` does."""
    check_range(self, document, start, stop)
    first = int(self._starts[document])
    return self._bytes.read(0, first + start, first + stop)


def read_manifest(folder: epath.Path) -> dict[str, Any]:
  """Returns what manifest.json says.

  Raises:
    DataError: it is not there, damaged, of another format, or lacks an entry.
  """
  path = folder / MANIFEST
  try:
    manifest = read_json(path, DataError, "pack the data again")
  except OSError as error:
    raise DataError(f"{path} cannot be read ({error.strerror or error}); pack the data again") from error
  if manifest.get("format") != FORMAT:
    raise DataError(f"{folder} is in the format {manifest.get('format')!r}; this version reads {FORMAT!r}")
  for key, kind in _KEYS.items():
    value = manifest.get(key)
    negative = isinstance(value, int) and value < 0
    if not isinstance(value, kind) or isinstance(value, bool) or negative:
      raise DataError(f"{path} has a wrong {key!r}; pack the data again")
  return manifest


def verify(path: epath.PathLike) -> None:
  """Checks that the files of a packed folder have their checksums, and as many bytes and documents as it says.

  Raises:
    DataError: names the file that has not.
  """
  folder = epath.Path(path)
  manifest = read_manifest(folder)
  if sorted(manifest["sha256"]) != sorted(FILES):
    raise DataError(f"{folder / MANIFEST} has not the checksums of {', '.join(FILES)}; pack the data again")
  for name in FILES:
    try:
      found = sha256_of(folder / name)
    except OSError as error:
      raise DataError(f"{folder / name} cannot be read ({error}); pack it again") from error
    if found != manifest["sha256"][name]:
      raise DataError(f"{folder / name} has changed since it was packed; pack it again")
  ends, _ = _read_ends(folder, manifest)
  _read_names(folder / _NAMES, len(ends))


def _read_ends(folder: epath.Path, manifest: dict[str, Any]) -> tuple[np.ndarray, str]:
  """Where each document ends in data.bin, int64 [documents]; and the SHA-256 sum of the file that says so.

  Raises:
    DataError: that file is damaged, or it, the manifest and the size of data.bin do not fit each other.
  """
  try:
    file = (folder / _ENDS).read_bytes()
    digest = hashlib.sha256(file).hexdigest()
    if digest != manifest["sha256"].get(_ENDS):
      raise ValueError(f"{_ENDS} does not have its checksum")
    ends = np.lib.format.read_array(io.BytesIO(file))
  except (OSError, ValueError) as error:
    raise DataError(f"{folder} is not whole ({error}); pack it again") from error
  [size] = sizes_of([str(folder / _DATA)])
  if size < 0:
    raise DataError(f"{folder / _DATA} cannot be read; pack it again")
  is_list = ends.ndim == 1 and ends.dtype == np.int64
  found = (len(ends), int(ends[-1]) if len(ends) else 0, size) if is_list else (0, 0, size)
  promised = (manifest["documents"], manifest["bytes"], manifest["bytes"])
  if found != promised:
    raise DataError(
      f"{folder} has {found[0]} documents and {found[2]:,} bytes instead of {promised[0]} and {promised[2]:,}"
    )
  unit = manifest["unit"]
  if not len(ends) or ends[0] <= 0 or (ends[1:] <= ends[:-1]).any() or unit < 1 or (ends % unit).any():
    raise DataError(
      f"{folder / _ENDS} has documents that are not one after the other, in units of {unit}; pack it again"
    )
  return ends, digest


def _read_names(path: epath.Path, documents: int) -> Sequence[str]:
  names = os.fsdecode(read_whole(str(path))).split("\n")[:-1]
  if len(names) != documents:
    raise DataError(f"{path} has {len(names)} names for {documents} documents; pack the data again")
  return names


def sha256_of(path: epath.Path) -> str:
  """Returns the SHA-256 of a file's contents."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()
