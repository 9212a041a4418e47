"""Keeps all but one process at a time out of a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from megabyte_jax.files.object_stores import is_remote


@contextlib.contextmanager
def locked(folder: str, otherwise: Exception) -> Iterator[None]:
  """Makes the folder if it is missing, and holds it; the lock ends with the process, however that ends.

  On storage that is not a local folder (gs://...), or whose file system has no locks, nothing is held.

  Raises:
    otherwise: another process holds it.
  """
  if is_remote(folder):
    yield
    return
  os.makedirs(folder, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise otherwise from None
    except OSError:  # a file system without locks
      pass
    yield
  finally:
    os.close(descriptor)
