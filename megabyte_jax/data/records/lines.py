"""Reads JSON Lines: one record per line, found again by an index of where each line begins."""

from __future__ import annotations

import array
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import ByteFiles, open_file
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.records import cache
from megabyte_jax.data.records.store import Numbered
from megabyte_jax.data.sources import RAW_HINT, SKIP_HINT, first_names, nothing_in
from megabyte_jax.display.progress import Progress
from megabyte_jax.errors import DataError

_BLOCK = 1 << 22  # bytes read at once
_LONGEST = 1 << 30  # bytes of a line; a file that has longer ones is not JSON Lines
_SHOWN = 1 << 27  # bytes of a file from which on its indexing is shown


class BadRecord(ValueError):
  """A line that holds no record with a text; the message says why, without the place."""


def text_of(line: bytes, field: str) -> bytes:
  """Returns the text in one field of a record, in UTF-8.

  Raises:
    BadRecord: the line is not a JSON object, or the field is missing or no text.
  """
  try:
    record = json.loads(line.decode())
  except json.JSONDecodeError as error:
    raise BadRecord(f"is not JSON ({error.msg} at character {error.colno})") from error
  except UnicodeDecodeError as error:
    raise BadRecord(f"is not UTF-8 (byte {error.start + 1})") from error
  except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in thousands of brackets
    raise BadRecord(f"is not JSON that can be read ({error})") from error
  if not isinstance(record, dict):
    raise BadRecord("is JSON, but not an object with fields")
  if field not in record:
    names = ", ".join(list(record)[:8]) or "none"
    raise BadRecord(f"has no field {field!r} (its fields: {names[:200]}); name another one as FILE#FIELD")
  value = record[field]
  if not isinstance(value, str):
    raise BadRecord(f"has no text in its field {field!r} but {json.dumps(value)[:40]}; name another one as FILE#FIELD")
  try:
    return value.encode()
  except UnicodeEncodeError as error:
    raise BadRecord(f"has half a surrogate pair in {field!r}, which UTF-8 cannot hold") from error


def lines_of(file: IO[bytes], path: str) -> Iterator[tuple[int, int, bytes, bool]]:
  """Yields (number from 1, first byte, line without its end, whether it has one) of all lines that are not blank.

  A byte-order mark of UTF-8 at the beginning is left out.

  Raises:
    DataError: a line is longer than a gigabyte, or the file is in UTF-16.
  """
  number, place, held = 0, 0, 0
  parts: list[bytes] = []  # of a line that goes on
  while True:
    block = file.read(_BLOCK)
    if number == 0 and place == 0 and not parts and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
      raise DataError(f"{path} is in UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    if block and b"\n" not in block:
      parts.append(block)
      held += len(block)
      if held > _LONGEST:
        raise DataError(f"{path}, line {number + 1} is longer than 1 GiB; JSON Lines have one record per line")
      continue
    lines = (b"".join(parts) + block).split(b"\n")
    for line in lines[:-1] if block else lines:
      number, start = number + 1, place
      place += len(line) + 1
      if start == 0 and line.startswith(b"\xef\xbb\xbf"):
        start, line = 3, line[3:]
      if line.strip():
        yield number, start, line, bool(block)
    if not block:
      return
    parts, held = [lines[-1]], len(lines[-1])


class Lines:
  """The texts of JSON Lines files, in one field; a `RecordStore`.

  The first opening reads each file once and keeps an index of it in the cache folder: where each line begins, and how
  long its text is. Records whose text is empty are left out and counted.

  Args:
    paths, names: where the files are and what they are called.
    field: holds the text.
    data: skip_bad leaves out and counts lines that cannot be read; cache_dir.
    shown: paths for errors, where `paths` are copies of other files.
    skip_empty: leave out and count empty files.

  Raises:
    DataError: a line holds no such text, and skip_bad is False; or no line does, `NothingInside` if all are blank.
  """

  def __init__(
    self,
    paths: Sequence[str],
    names: Sequence[str],
    field: str,
    data: DataConfig,
    shown: Sequence[str] | None = None,
    skip_empty: bool = False,
  ):
    shown_as = dict(zip(paths, shown or paths, strict=True))
    self._files, self._field = ByteFiles(paths, names, skip_bad=data.skip_bad, skip_empty=skip_empty), field
    self._shown = [shown_as[path] for path in self._files.paths]
    self.skipped, self.slow = self._files.skipped, self._files.slow
    indexes = []
    for path, shown_path in zip(self._files.paths, self._shown, strict=True):
      arrays, notes = _index(path, shown_path, field, data)
      if notes["bad"] and not data.skip_bad:
        raise _with_remedies(shown_path, notes["first"])
      self.skipped += notes["bad"] + notes["empty"]
      indexes.append(arrays)
    self._starts, self._widths, self.sizes, self._lines = (
      np.concatenate([arrays[name] for arrays in indexes]) for name in ("start", "width", "size", "line")
    )
    self.sizes = self.sizes.astype(np.int64)
    self.names = Numbered(self._files.names, [len(arrays["start"]) for arrays in indexes])
    if not len(self.sizes):
      records = self.skipped - self._files.skipped
      if not records:
        raise nothing_in(self._shown, "records")
      where = first_names(self._shown, len(self._shown))
      raise DataError(f"none of {records:,} records of {where} has a text in its field {field!r}")

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the files (see `fingerprint_files`) and the field."""
    return combine_fingerprints([self._files.fingerprint, self._field])

  def load(self, i: int) -> bytes:
    """Returns the value of record i; see `RecordStore`."""
    file, _ = self.names.find(i)
    start = int(self._starts[i])
    line = self._files.read(file, start, start + int(self._widths[i])).tobytes()
    try:
      return text_of(line, self._field)
    except BadRecord as error:
      raise DataError(f"{self.place(i)} has changed since the data were opened: it {error}; start again") from error

  def place(self, i: int) -> str:
    """Returns the place of record i; see `RecordStore`."""
    return f"{self._shown[self.names.find(i)[0]]}, line {self._lines[i]}"


def bad_line(path: str, number: int, error: BadRecord, has_end: bool) -> DataError:
  """Returns the error about a line that cannot be read; `has_end` tells whether a line break follows it."""
  return _with_remedies(path, _problem(number, error, has_end))


def _problem(number: int, error: BadRecord, has_end: bool) -> str:
  cut = "" if has_end else "; the file ends within this line, it may have been cut short"
  return f"line {number} {error}{cut}"


def _with_remedies(path: str, what: str) -> DataError:
  remedies = f"leave out and count all such lines with {SKIP_HINT}, or take the bytes as they are with {RAW_HINT}"
  return DataError(f"{path}, {what}; {remedies}")


def _index(path: str, shown: str, field: str, data: DataConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The index of one file, from the cache if it is there."""
  folder = os.path.join(cache.cache_folder(data.cache_dir), "indexes")
  belongs_to = cache.identity(path) | {"field": field, "kind": "lines"}
  name = cache.entry_name(belongs_to["path"], field, "lines")
  kept = os.path.join(folder, f"{name}.index")
  if found := cache.load_index(kept, belongs_to):
    return found
  with cache.held_if_writable(folder, name):
    if found := cache.load_index(kept, belongs_to):  # another process has made it meanwhile
      return found
    arrays, notes = _scan(path, shown, field, data.skip_bad, belongs_to["size"])
    cache.save_index(kept, belongs_to, arrays, notes)
  return arrays, notes


def _scan(path: str, shown: str, field: str, skip_bad: bool, size: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads a whole file. Raises DataError at the first bad line, unless `skip_bad` says to count them."""
  starts, widths, sizes, numbers = array.array("q"), array.array("i"), array.array("i"), array.array("I")
  notes: dict[str, Any] = {"bad": 0, "empty": 0, "first": ""}
  try:
    with Progress(f"indexing {shown}", size, enabled=size > _SHOWN) as progress, open_file(path) as file:
      for number, start, line, has_end in lines_of(file, shown):
        try:
          text = text_of(line, field)
        except BadRecord as error:
          if not skip_bad:
            raise bad_line(shown, number, error, has_end) from error
          notes["first"] = notes["first"] or _problem(number, error, has_end)
          notes["bad"] += 1
          continue
        if not text:
          notes["empty"] += 1
          continue
        starts.append(start)
        widths.append(len(line))
        sizes.append(len(text))
        numbers.append(number)
        progress.update(start)
  except OSError as error:
    raise DataError(f"{shown} cannot be read ({error.strerror or error})") from error
  arrays = {"start": starts, "width": widths, "size": sizes, "line": numbers}
  return {name: np.array(values) for name, values in arrays.items()}, notes
