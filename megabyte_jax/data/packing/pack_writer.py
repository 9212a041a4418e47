"""Writes packed folders (see packed_folder.py), interrupted or not."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from megabyte_jax.data.packing.archives import BadItem, Item
from megabyte_jax.data.packing.packed_folder import FORMAT, MANIFEST, PART, read_manifest, sha256_of
from megabyte_jax.display.progress import Progress
from megabyte_jax.errors import DataError
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.folder_lock import locked
from megabyte_jax.files.json_files import read_json
from megabyte_jax.files.outputs import NO_ROOM

_SAVE_EVERY = 1 << 26  # bytes between points from which a restart goes on
_STATE = "state.json"
# Key of the state, name, bytes of each that the state counts.
_FILES = (("bytes", "data.bin", 1), ("documents", "ends", 8), ("names", "names.txt", 1))


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
    self.path, self.part, self.unit = path.rstrip("/"), path.rstrip("/") + PART, unit
    self.request = dict(request)
    self.complete = os.path.lexists(self.path)
    if self.complete:
      whole = os.path.exists(os.path.join(path, MANIFEST))
      done = read_manifest(epath.Path(path))["request"] if whole else None
      if done is None or done != self.request:
        what = "holds other data" if done is None else f"was packed from {done}, not {self.request}"
        raise DataError(f"{path} exists and {what}; remove it or name another folder")
      _remove(self.path)
    counts = {"items": 0, "documents": 0, "bytes": 0, "names": 0, "skipped": 0}
    self._new: dict[str, Any] = {"request": self.request, **counts}
    self._state = self._new if self.complete else self._load_state()

  @property
  def items_done(self) -> int:
    """Items that a restart need not look at again."""
    return self._state["items"]

  def write(
    self,
    items: Iterable[Item],
    total_bytes: int = 0,
    skipped: int = 0,
    place: Callable[[], int] | None = None,
  ) -> None:
    """Writes (name, blocks of bytes) pairs, those after the first `items_done`; None counts as a skipped item.

    Where the request says skip_bad, so do items without bytes, and those whose blocks raise BadItem.

    Args:
      items: the items; iterating may raise DataError, which leaves the part for a later attempt.
      total_bytes: of all items, for the progress line; 0 where it is not known.
      skipped: items left out before, to be counted with the rest.
      place: how many of `total_bytes` have been read, where that is not what has been written.
    """
    if self.complete:
      return
    os.makedirs(os.path.dirname(self.part) or ".", exist_ok=True)
    with self._locked():
      try:
        begun = 0 if place else self._state["bytes"]
        with Progress("packing", (total_bytes - begun) or None) as progress:
          self._write_items(items, lambda: progress.update((place() if place else self._written) - begun))
        self._finish(skipped)
      except OSError as error:
        if error.errno not in NO_ROOM:
          raise
        done = self._state["bytes"]
        raise DataError(
          f"no room for more in {self.part} ({error.strerror}) after {done:,} bytes; free some and run the same "
          "command, which goes on from there"
        ) from error

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    """The part is this process's alone."""
    with locked(self.part, DataError(f"another process is writing {self.part}; wait until it is done")):
      if os.path.lexists(self.path) or self._load_state()["items"] != self._state["items"]:
        raise DataError(f"another process has been writing {self.part} meanwhile; run the same command once more")
      yield

  def _write_items(self, items: Iterable[Item], show: Callable[[], None]) -> None:
    skip_bad = bool(self.request.get("skip_bad"))
    with contextlib.ExitStack() as stack:
      files = {name: stack.enter_context(open(os.path.join(self.part, name), "ab")) for _, name, _ in _FILES}
      for key, name, width in _FILES:
        files[name].truncate(self._state[key] * width)
      self._save(files.values(), self._state)  # so that no later state meets these files
      saved, state = self._state["bytes"], dict(self._state)
      for item in items:
        state["items"] += 1
        size, bad = 0, item is None
        if item is not None:
          label, blocks = item
          try:
            for block in blocks:
              files["data.bin"].write(block)
              size += len(block)
              self._written = state["bytes"] + size
              show()
          except BadItem:
            if not skip_bad:
              raise
            bad = True
          if not bad and not size:
            if not skip_bad:
              raise DataError(f"{label} is empty; skip such items with --skip-bad")
            bad = True
        if bad:
          files["data.bin"].truncate(state["bytes"])
          state["skipped"] += 1
          continue
        state["bytes"] += size
        files["ends"].write(np.int64(state["bytes"]).tobytes())
        line = os.fsencode(" ".join(label.split())) + b"\n"
        files["names.txt"].write(line)
        state["documents"], state["names"] = state["documents"] + 1, state["names"] + len(line)
        if state["bytes"] - saved >= _SAVE_EVERY:
          self._save(files.values(), state)
          saved = state["bytes"]
      self._save(files.values(), state)

  def _save(self, files: Iterable[IO[bytes]], state: dict[str, Any]) -> None:
    for file in files:
      file.flush()
      os.fsync(file.fileno())
    with replacing(os.path.join(self.part, _STATE)) as temporary:
      temporary.write_text(json.dumps(state))
    self._state, self._written = dict(state), state["bytes"]

  def _load_state(self) -> dict[str, Any]:
    """Where an earlier attempt stopped; the very beginning if that was another request, or its files are not whole."""
    try:
      state = read_json(os.path.join(self.part, _STATE), DataError, "begin anew")
      sizes = [(os.path.getsize(os.path.join(self.part, name)), state[key] * width) for key, name, width in _FILES]
      whole = all(found >= promised for found, promised in sizes) and state["items"] >= 0
      return state if whole and state["request"] == self.request else self._new
    except (OSError, ValueError, KeyError, TypeError):
      return self._new

  def _finish(self, skipped: int) -> None:
    if not self._state["documents"]:
      raise DataError(f"nothing to pack into {self.path}: {self._state['skipped']} items were skipped")
    ends = np.fromfile(os.path.join(self.part, "ends"), np.int64)
    found = [os.path.getsize(os.path.join(self.part, name)) for _, name, _ in _FILES]
    if found != [self._state[key] * width for key, _, width in _FILES] or ends[-1] != self._state["bytes"]:
      raise DataError(f"{self.part} was changed while it was written; remove it and run the same command")
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
      "sha256": {name: sha256_of(part / name) for name in ("data.bin", "ends.npy", "names.txt")},
    }
    with replacing(part / MANIFEST) as temporary:
      temporary.write_text(json.dumps(manifest, indent=1))
    os.rename(self.part, self.path)
    self.complete = True
    _remove(self.path)  # not before: without one of them, a part that is not complete could not be continued


def _remove(folder: str) -> None:
  """Removes from a complete folder what was of use only until then."""
  for name in (_STATE, "ends"):
    with contextlib.suppress(OSError):
      os.unlink(os.path.join(folder, name))
