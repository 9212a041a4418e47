"""Says in one line why a checkpoint could not be saved, instead of what each of Orbax's threads logs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from megabyte_jax.errors import CheckpointError
from megabyte_jax.files.outputs import NO_ROOM

_NUMBER = re.compile(r"os_error_code='(\d+)'")  # TensorStore's words for what the file system said


def file_system_error(error: BaseException) -> OSError | None:
  """Returns what the file system said, be it in an OSError or in TensorStore's words; None where it said nothing."""
  seen: BaseException | None = error
  while seen is not None:
    if isinstance(seen, OSError) and seen.errno is not None:
      return seen
    if number := _NUMBER.search(str(seen)):
      return OSError(int(number[1]), os.strerror(int(number[1])))
    seen = seen.__cause__ or seen.__context__
  return None


def cannot_write(error: OSError, path: object, unsaved: int | None, good: int | None) -> CheckpointError:
  """Returns the one line about a run that ends because a file of it cannot be written.

  Args:
    error: what the file system said.
    path: of the file or folder.
    unsaved: the step whose checkpoint was being written, if one was.
    good: the newest step whose checkpoint is on disk, if there is one.
  """
  logging.getLogger("absl").addFilter(_is_news)  # threads of the save may end after this
  remedy = "make room there, or move the run to another place" if error.errno in NO_ROOM else "see to it"
  lost = "" if unsaved is None else f"the checkpoint of step {unsaved} was not saved, "
  if good is None:
    none = "no checkpoint was saved yet" if unsaved is None else f"{lost}and there is none before"
    kept = f"{none}: the same command starts anew"
  else:
    kept = f"{lost}that of step {good} is good: the same command goes on from it"
  return CheckpointError(f"{path}: {error.strerror}; {remedy}; {kept}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Leaves out what Orbax's and TensorStore's threads log of a save that fails: `Checkpoints.wait` raises it."""
  logger, hook = logging.getLogger("absl"), sys.unraisablehook

  def on_unraisable(unraisable: Any) -> None:
    # Callbacks of TensorStore whose event loop was closed by another's error.
    if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
      hook(unraisable)

  logger.addFilter(_is_news)
  sys.unraisablehook = on_unraisable
  # Not taken back: they are thrown away at any time after the save that failed.
  logging.getLogger("asyncio").addFilter(_is_no_orphan)
  warnings.filterwarnings("ignore", r"coroutine '.*async_serialize.*' was never awaited", RuntimeWarning)
  try:
    yield
  finally:
    logger.removeFilter(_is_news)
    sys.unraisablehook = hook


def _is_news(record: logging.LogRecord) -> bool:
  """Returns False for an error that Orbax logs and raises, too."""
  return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


def _is_no_orphan(record: logging.LogRecord) -> bool:
  """Returns False for the error of a task or thread of Orbax's for which nobody waits: it was raised before."""
  message, error = record.getMessage(), record.exc_info[1] if record.exc_info else None
  of_the_save = "orbax" in message or (error is not None and file_system_error(error) is not None)
  return not ("never retrieved" in message and of_the_save)
