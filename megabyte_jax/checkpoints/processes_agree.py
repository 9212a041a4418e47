"""Lets the processes of a run agree: one looks and decides, all do the same."""

from __future__ import annotations

import uuid

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from megabyte_jax.errors import CheckpointError


def from_first_process(value: int) -> int:
  """Returns `value` as process 0 has it; also a meeting point of all processes."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_shared(folder: epath.Path) -> None:
  """Checks that each process sees the folder of process 0, where all write their parts of a checkpoint.

  Raises:
    CheckpointError: one does not; raised in all processes.
  """
  if jax.process_count() == 1:
    return
  folder.mkdir(parents=True, exist_ok=True)
  number = from_first_process(uuid.uuid4().int % 2**31)
  sign = folder / f".shared-{number}"
  if jax.process_index() == 0:
    sign.touch()
  from_first_process(0)
  blind = np.flatnonzero(~multihost_utils.process_allgather(np.asarray(sign.exists())).ravel())
  if jax.process_index() == 0:
    sign.unlink()
  if blind.size:
    raise CheckpointError(
      f"processes {', '.join(map(str, blind.tolist()))} do not see {folder} as process 0 does; --workdir must be on a "
      "file system that all hosts share, or in a bucket"
    )
