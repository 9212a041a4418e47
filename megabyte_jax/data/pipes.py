"""Reads pipes, such as /dev/stdin and <(zcat corpus.gz): once, into memory."""

from __future__ import annotations

import functools
import os
import stat

import numpy as np

from megabyte_jax.data.fingerprints import combine_fingerprints, hash_values
from megabyte_jax.data.sources import check_range
from megabyte_jax.errors import DataError
from megabyte_jax.files.inputs import check_readable, waiting_is_said

_MOST = 1 << 30  # bytes
_BLOCK = 1 << 20


def is_special(path: str) -> bool:
  """Tells whether a local path names a pipe, a device or a socket rather than a file or folder."""
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError):
    return False
  return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_pipe(path: str) -> Pipe:
  """Returns the source of what comes through a pipe, which is read to its end; again for the same pipe, the same.

  Raises:
    DataError: it is a terminal, a socket or another device; it holds nothing, or more than a gigabyte.
  """
  check_readable(path, DataError)
  status = os.stat(path)
  return _read_once(path, status.st_dev, status.st_ino)


class Pipe:
  """All bytes of a pipe as one document."""

  joinable, unit, slow, skipped = True, 1, False, 0

  def __init__(self, path: str, data: bytes):
    self.names, self._bytes = [path], np.frombuffer(data, np.uint8)
    self.lengths = np.array([len(data)], np.int64)
    self.fingerprint = combine_fingerprints([hash_values([data])])

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Reads bytes; see `Source`."""
    check_range(self, document, start, stop)
    return self._bytes[start:stop].copy()


@functools.lru_cache(maxsize=8)
def _read_once(path: str, device: int, inode: int) -> Pipe:
  """Reads a pipe to its end; another one that has got the same path differs in its device or inode."""
  blocks, length = [], 0
  try:
    with waiting_is_said(path) as waiting, open(path, "rb", buffering=0) as file:
      while block := file.read(_BLOCK):
        waiting.cancel()
        blocks.append(block)
        length += len(block)
        if length > _MOST:
          raise DataError(f"{path} is a pipe of more than {_MOST:,} bytes; write them to a file and name that")
  except OSError as error:
    raise DataError(f"{path} is a pipe that cannot be read ({error.strerror or error})") from error
  if not length:
    raise DataError(f"{path} is a pipe through which nothing came; look at the command that writes to it")
  return Pipe(path, b"".join(blocks))
