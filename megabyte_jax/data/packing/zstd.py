"""Reads Zstandard files to their very end, and notices where one has none."""

from __future__ import annotations

import io
from typing import IO, Any

from megabyte_jax.errors import DataError

_BLOCK = 1 << 13  # compressed bytes at a time: of zeros they may become a gigabyte
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` makes


class ZstdFile(io.RawIOBase):
  """Reads what a file of one or several frames holds; skippable frames hold nothing.

  Args:
    file: the compressed file.

  Raises:
    DataError: the package zstandard is not installed.
    OSError: while it is read: the data are damaged.
    EOFError: while it is read: the last frame has no end.
  """

  def __init__(self, file: IO[bytes]):
    self._zstandard = import_zstandard()
    self._file, self._frame, self._begun = file, self._new_frame(), False
    self._rest = b""  # compressed
    self._ready, self._place = b"", 0  # decompressed

  def _new_frame(self) -> Any:
    return self._zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()

  def readable(self) -> bool:
    """Returns True."""
    return True

  def readinto(self, buffer: Any) -> int:
    """Fills `buffer` and returns how many bytes there were; 0 at the end."""
    while self._place == len(self._ready):
      if not self._decompress():
        return 0
    count = min(len(buffer), len(self._ready) - self._place)
    buffer[:count] = memoryview(self._ready)[self._place : self._place + count]
    self._place += count
    return count

  def _decompress(self) -> bool:
    """Makes the next bytes ready; False at the end of the file."""
    block = self._rest or self._file.read(_BLOCK)
    if not block:
      if self._begun:
        raise EOFError("the compressed data have no end")
      return False
    try:
      self._ready, self._place = self._frame.decompress(block), 0
    except (self._zstandard.ZstdError, MemoryError) as error:
      raise OSError(f"{error}") from error
    self._begun, self._rest = True, b""
    if self._frame.eof:
      self._rest, self._frame, self._begun = self._frame.unused_data, self._new_frame(), False
    return True


def import_zstandard() -> Any:
  """Returns the module zstandard. Raises DataError with the command that installs it where it is missing."""
  try:
    import zstandard  # noqa: PLC0415
  except ImportError as error:
    raise DataError('.zst files need zstandard, which is not installed: pip install -e ".[records]"') from error
  return zstandard
