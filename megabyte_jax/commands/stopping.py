"""Ends a command by Ctrl-C, SIGTERM or SIGHUP without a traceback, and removes what is half written."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from megabyte_jax.files.atomic_file import remove_temporaries
from megabyte_jax.parallel import distributed

_PATIENCE = 5  # seconds for Python to act on a signal: it cannot while a library compiles or reads
_came: list[int] = []  # signals other than Ctrl-C


def install_signal_handlers() -> None:
  """Has Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, so that what is half written is removed on the way.

  What the user or another program has set stays, as SIGHUP under nohup. Where Python does not act on SIGTERM or SIGHUP
  within seconds, a thread removes temporary files and ends the process.
  """
  sys.unraisablehook = _interrupt_again
  if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
    signal.signal(signal.SIGINT, _on_interrupt)
  ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
  for number in ours:
    signal.signal(number, _on_termination)
  if ours:
    heard, say = os.pipe()
    os.set_blocking(say, False)
    signal.set_wakeup_fd(say, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard,), daemon=True).start()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
  """Has these signals end the process at once within the block, where nothing is written and a library is at work."""
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  heard = [number for number, handler in before.items() if handler in (_on_interrupt, _on_termination)]
  for number in heard:
    signal.signal(number, signal.SIG_DFL)
  try:
    yield
  finally:
    for number in heard:
      signal.signal(number, before[number])


def end() -> NoReturn:
  """Ends the process after KeyboardInterrupt, by the signal that came; by exit code 130 after Ctrl-C."""
  remove_temporaries()  # a second signal may have come while exceptions did so
  if not _came:
    print("interrupted", file=sys.stderr)
    distributed.end(130, at_once=True)
  with contextlib.suppress(OSError):  # nobody reads any more
    sys.stdout.flush()
  signal.signal(_came[0], signal.SIG_DFL)
  signal.raise_signal(_came[0])
  distributed.end(128 + _came[0], at_once=True)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
  """Ctrl-C: KeyboardInterrupt, but while libraries are imported the end of the process, without a traceback."""
  at = frame
  while at is not None:
    if at.f_code.co_filename.startswith("<frozen importlib"):
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
    at = at.f_back
  signal.default_int_handler(number, frame)


def _on_termination(number: int, frame: FrameType | None) -> None:
  _came.append(number)
  _on_interrupt(number, frame)


def _watch(heard: int) -> None:
  while True:
    for number in os.read(heard, 64):
      if signal.getsignal(number) is _on_termination:  # in training it saves and ends the run
        time.sleep(_PATIENCE)
        remove_temporaries()
        os._exit(128 + number)


def _interrupt_again(unraisable: Any) -> None:
  """A Ctrl-C that fell into a callback of the garbage collector, JAX's for instance, where Python forgets it."""
  if unraisable.exc_type is not KeyboardInterrupt:
    return sys.__unraisablehook__(unraisable)
  threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
