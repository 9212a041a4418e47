"""Decides what SIGTERM, Ctrl-C and SIGHUP do to a training run: the step at hand is saved, and the run ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading

import jax

from megabyte_jax.parallel import distributed


class Interrupted(Exception):
  """An evaluation was broken off by a signal."""


class StopSignal:
  """Hears SIGTERM (what schedulers send), Ctrl-C and SIGHUP; a second Ctrl-C stops at once.

  SIGHUP comes with the end of a terminal or an ssh connection. Where it is ignored already (`nohup`), it stays so.

  `requested` turns True when a signal came. With several processes it never does: there JAX hears SIGTERM, and all
  agree on a step (`Checkpoints.preempted`). Outside the main thread, where Python allows no signal handlers, nothing
  is heard, and signals do what the program at hand has them do.
  """

  def __init__(self):
    self.requested, self._finished = False, ""
    self._alone = jax.process_count() == 1
    heard = [signal.SIGTERM, signal.SIGINT] if self._alone else [signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      heard.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
      heard = []
    self._before = {number: signal.signal(number, self._on_signal) for number in heard}

  def __enter__(self) -> StopSignal:
    return self

  def __exit__(self, *_: object) -> None:
    while self._before:  # signals do again what they did before
      signal.signal(*self._before.popitem())

  def check(self, *_: object) -> None:
    """Raises Interrupted once a stop is requested; a long evaluation calls this as it goes."""
    if self.requested:
      raise Interrupted

  def all_is_saved(self, workdir: str, evaluates: bool) -> None:
    """Lets a signal end the process at once from now on, with exit code 0: only measuring and drawing are left."""
    part = f"python -m megabyte_jax eval --workdir={shlex.quote(workdir)} --max-bytes=1000000"
    rest = f"repeats the final evaluation, and `{part}` scores a part" if evaluates else "repeats the final samples"
    self._finished = f"\nall steps are saved in {workdir}; the same command {rest}\n"
    if self.requested:
      self._end()

  def _end(self) -> None:
    _say(self._finished)
    distributed.end(0, at_once=True)  # an exception may be lost in a callback, or crash what is compiling

  def _on_signal(self, number, frame):
    if self._finished and self._alone:
      self._end()
    self.requested = self._alone
    if not self._alone:
      signal.raise_signal(signal.SIGTERM)
    _say("\nstopping after the steps under way; a second Ctrl-C stops at once, without saving\n")
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _say(text: str) -> None:
  """Writes to standard error, if anything still shows it; print may not be called in a signal's handler."""
  with contextlib.suppress(OSError):
    os.write(2, text.encode())
