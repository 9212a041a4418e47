"""Packed data: a folder with all documents in one file, ready to be read at any place.

  data.bin       the bytes of all documents, one after the other
  ends.npy       int64 [documents], where each ends in data.bin
  names.txt      one name a line
  manifest.json  sizes, checksums, where the bytes come from and how they were made

A folder appears under its name only when it is complete. Until then it is called NAME.part, and the same command
continues it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import ByteFiles, read_whole
from megabyte_jax.data.fingerprints import pair_fingerprints
from megabyte_jax.data.sources import check_range
from megabyte_jax.errors import DataError, require

FORMAT = "megabyte_jax packed bytes 1"
PART = ".part"  # ends the name of a folder that is not complete
MANIFEST = "manifest.json"
_BLOCK = 1 << 22  # bytes read at once for a checksum
_KEYS = {"bytes": int, "documents": int, "skipped": int, "unit": int, "settings": dict, "request": dict, "sha256": dict}
# Settings that change the bytes, by form of data: a folder packed with others is refused.
_SETTINGS = {
  "bytes": (),
  "image": ("image_size", "image_tiles", "convert_images", "scan", "scan_patch"),
  "audio": ("sample_rate", "encoding"),
}


def settings_of(data: DataConfig) -> dict[str, Any]:
  """The settings under which `data` turns items into bytes, as the manifest records them."""
  return {"form": data.form, **{name: getattr(data, name) for name in _SETTINGS[data.form]}}


def is_packed(path: epath.PathLike) -> bool:
  """Whether a folder holds packed data. Raises DataError for one that is not complete: its files are no documents."""
  folder = epath.Path(path)
  if (folder / MANIFEST).exists() and not str(path).rstrip("/").endswith(PART):
    return True
  if (folder / "data.bin").exists() and any((folder / name).exists() for name in ("ends", "ends.npy")):
    raise DataError(
      f"{path} is packed data that are not complete ({MANIFEST} is missing, or it is still being made); run the "
      "command that packs it once more"
    )
  return False


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
    try:
      ends_file = (folder / "ends.npy").read_bytes()
      if hashlib.sha256(ends_file).hexdigest() != self.manifest["sha256"].get("ends.npy"):
        raise ValueError("ends.npy does not have its checksum")
      ends = np.lib.format.read_array(io.BytesIO(ends_file))
      self._bytes = ByteFiles([str(folder / "data.bin")], ["data.bin"])
    except DataError:
      raise
    except (OSError, ValueError) as error:
      raise DataError(f"{path} is not whole ({error}); pack it again") from error
    found = (len(ends), int(ends[-1]) if len(ends) else 0, int(self._bytes.lengths[0]))
    promised = (self.manifest["documents"], self.manifest["bytes"], self.manifest["bytes"])
    if found != promised:
      raise DataError(
        f"{path} has {found[0]} documents and {found[2]:,} bytes instead of {promised[0]} and {promised[2]:,}"
      )
    self._folder = folder
    self._starts = np.concatenate([[0], ends[:-1]])
    self.lengths = np.diff(ends, prepend=0).astype(np.int64)
    self.slow = self._bytes.slow
    self.joinable = data.form != "image"
    self.unit = self.manifest["unit"]
    self.skipped = self.manifest["skipped"]
    older = hashlib.sha256(ends_file).hexdigest()[:8] + self._bytes.fingerprint[:8]
    contents = [self._bytes.fingerprint, self.manifest["sha256"].get("data.bin")]
    self.fingerprint = pair_fingerprints(older, hashlib.sha256(repr(contents).encode()).hexdigest()[:16])

  @functools.cached_property
  def names(self) -> Sequence[str]:
    """One name per document. Raises DataError where they are not there."""
    path = self._folder / "names.txt"
    names = os.fsdecode(read_whole(str(path))).split("\n")[:-1]
    if len(names) != len(self.lengths):
      raise DataError(f"{path} has {len(names)} names for {len(self.lengths)} documents; pack the data again")
    return names

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """See `Source.read`."""
    check_range(self, document, start, stop)
    first = int(self._starts[document])
    return self._bytes.read(0, first + start, first + stop)


def read_manifest(folder: epath.Path) -> dict[str, Any]:
  """What manifest.json says. Raises DataError where it is not there or is none."""
  try:
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
      raise DataError(f"{folder} is in the format {manifest['format']!r}; this version reads {FORMAT!r}")
    missing = [key for key, kind in _KEYS.items() if not isinstance(manifest[key], kind)]
    if missing:
      raise DataError(f"{folder / MANIFEST} has a wrong {missing[0]!r}; pack the data again")
    return manifest
  except DataError:
    raise
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise DataError(f"{folder / MANIFEST} cannot be read ({error!r}); pack the data again") from error


def verify(path: epath.PathLike) -> None:
  """Raises DataError unless every file of a packed folder has the checksum in its manifest."""
  folder = epath.Path(path)
  for name, expected in read_manifest(folder)["sha256"].items():
    try:
      found = sha256_of(folder / name)
    except OSError as error:
      raise DataError(f"{folder / name} cannot be read ({error}); pack it again") from error
    if found != expected:
      raise DataError(f"{folder / name} has changed since it was packed; pack it again")


def sha256_of(path: epath.Path) -> str:
  """Of a file's contents."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()
