"""Notices that a run's work directory was moved, deleted or replaced while the run goes on."""

from __future__ import annotations

import contextlib
import os
import sys

import jax

from megabyte_jax.checkpoints.saved_config import CONFIG_FILE, save_config
from megabyte_jax.config import Config
from megabyte_jax.errors import CheckpointError, in_one_line
from megabyte_jax.files.object_stores import is_remote


class SameFolder:
  """The work directory as it is when the run begins; process 0 looks at it, and nobody at one in a bucket.

  Args:
    workdir: the folder, with the run's config.json in it.
    config: of the run.
  """

  def __init__(self, workdir: str, config: Config):
    self._workdir, self._config, self._descriptor = workdir, config, -1
    if not is_remote(workdir) and jax.process_index() == 0:
      self._descriptor = os.open(workdir, os.O_RDONLY)
      self._written = self._read_config()

  def __enter__(self) -> SameFolder:
    return self

  def __exit__(self, *_: object) -> None:
    if self._descriptor >= 0:
      os.close(self._descriptor)
      self._descriptor = -1

  def check(self) -> None:
    """Makes a missing folder anew, so that what comes next can be saved, and says so.

    Raises:
      CheckpointError: the path leads to another run's folder, whose checkpoints would be lost.
    """
    if self._descriptor < 0 or self._is_the_same():
      return
    if not os.path.exists(self._workdir):
      text = (
        f"warning: {self._workdir} was moved or deleted while training; it is made anew, for what comes from now on"
      )
      print(in_one_line(text), file=sys.stderr, flush=True)
      save_config(self._workdir, self._config)
    elif self._read_config() != self._written:  # inodes alone do not tell on every file system
      raise CheckpointError(
        f"{self._workdir} is no longer the folder that this run began in, and nothing more is written there; put that "
        "folder back, and the same command goes on from its newest checkpoint"
      )

  def _is_the_same(self) -> bool:
    with contextlib.suppress(OSError):
      return os.path.samestat(os.fstat(self._descriptor), os.stat(self._workdir))
    return False

  def _read_config(self) -> bytes:
    with contextlib.suppress(OSError), open(os.path.join(self._workdir, CONFIG_FILE), "rb") as file:
      return file.read()
    return b""
