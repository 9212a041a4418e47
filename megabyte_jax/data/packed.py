"""Packed data: a folder with all documents in one file, ready to be mapped into memory.

  data.bin       the bytes of all documents, one after the other
  ends.npy       int64 [documents], where each ends in data.bin
  names.txt      one name a line
  manifest.json  sizes, checksums, where the bytes come from and how they were made

A folder appears under its name only when it is complete. Until then it is called NAME.part, and the same command
continues it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from megabyte_jax.atomic_file import replacing
from megabyte_jax.config import DataConfig
from megabyte_jax.config_parsing import require
from megabyte_jax.data.files import ByteFiles
from megabyte_jax.data.sources import DataError, check_range

FORMAT = "megabyte_jax packed bytes 1"
MANIFEST = "manifest.json"
_SAVE_EVERY = 1 << 26  # bytes between points from which a restart goes on
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
  """Whether a folder holds packed data."""
  return (epath.Path(path) / MANIFEST).exists()


class Packed:
  """The source of a packed folder.

  Raises:
    ConfigError: `data` asks for other bytes (another image size, say) than were packed.
    DataError: a file is missing, or has another size than the manifest says.
  """

  def __init__(self, path: epath.PathLike, data: DataConfig):
    folder = epath.Path(path)
    self.manifest = _read_manifest(folder)
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
    self.fingerprint = hashlib.sha256(ends_file).hexdigest()[:8] + self._bytes.fingerprint[:8]

  @functools.cached_property
  def names(self) -> Sequence[str]:
    """One name per document."""
    return (self._folder / "names.txt").read_text().splitlines()

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """See `Source.read`."""
    check_range(self, document, start, stop)
    first = int(self._starts[document])
    return self._bytes.read(0, first + start, first + stop)


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
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
  for name, expected in _read_manifest(folder)["sha256"].items():
    try:
      found = _sha256(folder / name)
    except OSError as error:
      raise DataError(f"{folder / name} cannot be read ({error}); pack it again") from error
    if found != expected:
      raise DataError(f"{folder / name} has changed since it was packed; pack it again")


class PackWriter:
  """Writes a packed folder, from where an earlier attempt stopped if there was one.

  Args:
    path: the folder to make; local.
    request: what is packed and how; an unfinished folder of another request is begun anew.
    unit: see `Source`.

  Raises:
    DataError: `path` exists and was not packed from the same request.
  """

  def __init__(self, path: str, request: Mapping[str, Any], unit: int = 1):
    self.path, self.part, self.unit = path.rstrip("/"), path.rstrip("/") + ".part", unit
    self.request = dict(request)
    self.complete = os.path.exists(self.path)
    if self.complete:
      done = _read_manifest(epath.Path(path))["request"] if is_packed(path) else None
      if done != self.request:
        what = "holds other data" if done is None else f"was packed from {done}, not {self.request}"
        raise DataError(f"{path} exists and {what}; remove it or name another folder")
    self._state = {"request": self.request, "items": 0, "documents": 0, "bytes": 0, "names": 0, "skipped": 0}

  @property
  def items_done(self) -> int:
    """Items that a restart need not look at again."""
    return self._state["items"] if self.complete else self._load_state()["items"]

  def write(self, items: Iterable[tuple[str, Iterator[bytes]] | None], total_bytes: int = 0, skipped: int = 0) -> None:
    """Writes (name, blocks of bytes) pairs, those after the first `items_done`; None counts as a skipped item.

    Args:
      items: the items; iterating may raise DataError, which leaves the part for a later attempt.
      total_bytes: of all items, for the progress line; 0 where it is not known.
      skipped: items left out before, to be counted with the rest.
    """
    if self.complete:
      return
    self._state = self._load_state()
    os.makedirs(self.part, exist_ok=True)
    try:
      self._write_items(items, _Progress(total_bytes, self._state["bytes"]))
      self._finish(skipped)
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise
      done = self._state["bytes"]
      raise DataError(
        f"no room for more in {self.part} ({error.strerror}) after {done:,} bytes; free some and run the same command, "
        "which goes on from there"
      ) from error

  def _write_items(self, items: Iterable[tuple[str, Iterator[bytes]] | None], progress: _Progress) -> None:
    with contextlib.ExitStack() as stack:
      files = {
        name: stack.enter_context(open(os.path.join(self.part, name), "ab"))
        for name in ("data.bin", "ends", "names.txt")
      }
      for key, name, width in (("bytes", "data.bin", 1), ("documents", "ends", 8), ("names", "names.txt", 1)):
        files[name].truncate(self._state[key] * width)
      saved, state = self._state["bytes"], dict(self._state)
      for item in items:
        state["items"] += 1
        if item is None:
          state["skipped"] += 1
          continue
        label, blocks = item
        before = state["bytes"]
        for block in blocks:
          files["data.bin"].write(block)
          state["bytes"] += len(block)
          progress.show(state["bytes"])
        if state["bytes"] == before:
          raise DataError(f"{label} is empty; skip such items with --skip_bad")
        files["ends"].write(np.int64(state["bytes"]).tobytes())
        line = " ".join(label.split()).encode() + b"\n"
        files["names.txt"].write(line)
        state["documents"], state["names"] = state["documents"] + 1, state["names"] + len(line)
        if state["bytes"] - saved >= _SAVE_EVERY:
          self._save(files.values(), state)
          saved = state["bytes"]
      self._save(files.values(), state)
      progress.show(state["bytes"], last=True)

  def _save(self, files: Iterable[Any], state: dict[str, Any]) -> None:
    for file in files:
      file.flush()
      os.fsync(file.fileno())
    with replacing(os.path.join(self.part, "state.json")) as temporary:
      temporary.write_text(json.dumps(state))
    self._state = dict(state)

  def _load_state(self) -> dict[str, Any]:
    try:
      with open(os.path.join(self.part, "state.json")) as file:
        state = json.load(file)
      return state if state["request"] == self.request else self._state
    except (OSError, ValueError, KeyError):
      return self._state

  def _finish(self, skipped: int) -> None:
    if not self._state["documents"]:
      raise DataError(f"nothing to pack into {self.path}: {self._state['skipped']} items were skipped")
    ends = np.fromfile(os.path.join(self.part, "ends"), np.int64)
    with replacing(os.path.join(self.part, "ends.npy")) as temporary, temporary.open("wb") as file:
      np.save(file, ends)
    part = epath.Path(self.part)
    manifest = {
      "format": FORMAT,
      **{key: self._state[key] for key in ("bytes", "documents")},
      "skipped": self._state["skipped"] + skipped,
      "unit": self.unit,
      "settings": self.request["settings"],
      "request": self.request,
      "sha256": {name: _sha256(part / name) for name in ("data.bin", "ends.npy", "names.txt")},
    }
    with replacing(part / MANIFEST) as temporary:
      temporary.write_text(json.dumps(manifest, indent=1))
    for name in ("ends", "state.json"):
      os.unlink(os.path.join(self.part, name))
    os.rename(self.part, self.path)
    self.complete = True


def _sha256(path: epath.Path) -> str:
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()


class _Progress:
  """One line on standard error: bytes done, their rate, time left."""

  def __init__(self, total: int, done: int):
    self.total, self.first, self.started, self.shown = total, done, time.monotonic(), 0.0

  def show(self, done: int, last: bool = False) -> None:
    now = time.monotonic()
    if now - self.shown < 0.5 and not last:
      return
    self.shown = now
    rate = (done - self.first) / max(now - self.started, 1e-3)
    line = f"{done / 1e6:,.1f} MB"
    if self.total:
      filled = min(20, 20 * done // self.total)
      line = f"[{'#' * filled}{'.' * (20 - filled)}] {line} of {self.total / 1e6:,.1f}"
      line += f", {max(0, self.total - done) / max(rate, 1):,.0f} s left"
    print(f"\r{line}, {rate / 1e6:,.1f} MB/s   ", end="\n" if last else "", file=sys.stderr, flush=True)
