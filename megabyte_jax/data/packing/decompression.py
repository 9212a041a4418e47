"""Reads bz2 and xz files to their very end; Python's own readers take a damaged later stream for nothing at all."""

from __future__ import annotations

import bz2
import io
import lzma
from typing import IO, Any

_BLOCK = 1 << 20


class Decompressed(io.RawIOBase):
  """Reads what a file of one or several streams holds.

  Args:
    file: the compressed file.
    kind: bz2 | xz.

  Raises:
    OSError, lzma.LZMAError: while it is read: the data are damaged, or something else follows a stream.
    EOFError: while it is read: the last stream has no end.
  """

  def __init__(self, file: IO[bytes], kind: str):
    self._file, self._kind = file, kind
    self._stream, self._compressed = self._new_stream(), b""

  def _new_stream(self) -> bz2.BZ2Decompressor | lzma.LZMADecompressor:
    return bz2.BZ2Decompressor() if self._kind == "bz2" else lzma.LZMADecompressor(lzma.FORMAT_XZ)

  def readable(self) -> bool:
    """Returns True."""
    return True

  def readinto(self, buffer: Any) -> int:
    """Fills `buffer` and returns how many bytes there were; 0 at the end."""
    while True:
      if self._stream.eof and not self._next_stream():
        return 0
      if self._stream.needs_input and not self._compressed:
        self._compressed = self._file.read(_BLOCK)
        if not self._compressed:
          raise EOFError("the compressed data have no end")
      data = self._stream.decompress(self._compressed, len(buffer))
      self._compressed = b""
      if data:
        buffer[: len(data)] = data
        return len(data)

  def _next_stream(self) -> bool:
    """Begins the stream after the one that has ended; False where there is none."""
    rest = self._stream.unused_data or self._file.read(_BLOCK)
    if self._kind == "xz":  # zeros may follow a stream, four at a time
      zeros = 0
      while rest and not rest.strip(b"\0"):
        zeros += len(rest)
        rest = self._file.read(_BLOCK)
      zeros += len(rest) - len(rest.lstrip(b"\0"))
      rest = rest.lstrip(b"\0")
      if zeros % 4:
        raise lzma.LZMAError("wrong padding after a stream")
    if not rest:
      return False
    self._stream, self._compressed = self._new_stream(), rest
    return True
