"""Looks at files before they are read: devices never end, and a pipe may have nobody who writes into it."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Iterator

from megabyte_jax.errors import UserError, require

_PATIENCE = 5  # seconds of waiting without a word
_KINDS = {stat.S_IFCHR: "a terminal or a device", stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}


def check_readable(path: str, kind: type[UserError]) -> None:
  """Raises an error of type `kind` where a local path names a device, a terminal or a socket, which have no end."""
  try:
    mode = stat.S_IFMT(os.stat(path).st_mode)
  except (OSError, ValueError):
    return  # said when it is opened
  if mode in _KINDS:
    raise kind(f"{path} is {_KINDS[mode]}; name a file, a folder or a pipe")


@contextlib.contextmanager
def waiting_is_said(path: str, seconds: float = _PATIENCE) -> Iterator[threading.Timer]:
  """Says after some seconds that nothing comes through a pipe; yields the timer, to be cancelled when it does.

  Of a path that names no pipe nothing is said.
  """
  timer = threading.Timer(seconds, logging.warning, ("%s is a pipe: waiting for somebody to write into it", path))
  timer.daemon = True
  if _is_pipe(path):
    timer.start()
  try:
    yield timer
  finally:
    timer.cancel()


def _is_pipe(path: str) -> bool:
  try:
    return stat.S_ISFIFO(os.stat(path).st_mode)
  except (OSError, ValueError):
    return False


def check_not_replaced(name: str, output: str, inputs: str) -> None:
  """Checks that writing a file does not destroy what a command reads.

  Args:
    name: of the argument that says where to write, for the message.
    output: the path that it gives.
    inputs: the path of a file that is read.

  Raises:
    ConfigError: both are the same file.
  """
  same = False
  with contextlib.suppress(OSError, ValueError):
    same = os.path.samefile(output, inputs) and stat.S_ISREG(os.stat(output).st_mode)
  require(not same, f"{name}={output} is the file that is read, {inputs}; it would be lost: choose another {name}")
