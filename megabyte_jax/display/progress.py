"""Formats numbers for people: amounts, durations, and a line with the progress of long work."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_EVERY = 0.25  # seconds between two updates, at least
_LINE_EVERY = 60.0  # the same where the stream is a file
_ELAPSED_EVERY = 30.0  # seconds between two lines about work whose end is not known


def human(value: float, unit: str = "") -> str:
  """Formats a number with three significant digits and a decimal prefix: human(1.2e6, "B/s") is "1.20 MB/s"."""
  if not math.isfinite(value):
    return f"{value} {unit}".rstrip()
  size, index = abs(value), 0
  while size >= 999.5 and index + 1 < len(_PREFIXES):
    size, index = size / 1000, index + 1
  if index == 0 and size == int(size):
    digits = 0
  else:
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
  return f"{math.copysign(size, value):.{digits}f} {_PREFIXES[index]}{unit}".rstrip()


def duration(seconds: float) -> str:
  """Formats seconds by their two largest units: "4.2s", "45s", "3m12s", "2h05m", "3d04h"."""
  if not math.isfinite(seconds):
    return "?"
  if seconds < 9.95:
    return f"{seconds:.1f}s"
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f"{days}d{hours:02}h"
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


@contextlib.contextmanager
def elapsed(label: str, every: float = _ELAPSED_EVERY) -> Iterator[None]:
  """Says on stderr every `every` seconds how long the block has taken: for work that reports nothing itself."""
  start, over = time.monotonic(), threading.Event()

  def say() -> None:
    while not over.wait(every):
      print(f"{label}: {duration(time.monotonic() - start)} so far", file=sys.stderr, flush=True)

  thread = threading.Thread(target=say, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


class Progress:
  """A line on a terminal with rate and time left, rewritten a few times a second; a context manager.

  Where the stream is not a terminal, a line appears every minute, and the last one when all is done.

    with Progress("scoring", total=len(data)) as progress:
      for window in windows:
        ...
        progress.add(window.size)
  """

  def __init__(
    self,
    label: str,
    total: float | None = None,
    *,
    compiles: bool = False,
    stream: TextIO | None = None,
    enabled: bool = True,
  ):
    """Starts the clock.

    Args:
      label: name of the work.
      total: bytes of work; None if unknown.
      compiles: True if the work begins with compilation, so that the last line says that its rate includes it.
      stream: None takes stderr.
      enabled: False shows nothing; set for all processes but one.
    """
    self.done = 0.0
    self._label, self._total = label, total
    self._included = ", compilation included" if compiles else ""
    self._stream = stream or sys.stderr
    self._enabled = enabled
    self._live = enabled and self._stream.isatty()
    self._start = time.monotonic()
    self._shown = -math.inf if self._live else self._start

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is None:
      self.finish()
    elif self._live:
      self._stream.write("\n")

  @property
  def seconds(self) -> float:
    """Seconds since the start."""
    return time.monotonic() - self._start

  def add(self, amount: float) -> None:
    """Adds `amount` bytes to those done."""
    self.update(self.done + amount)

  def update(self, done: float, total: float | None = None) -> None:
    """Sets the bytes done and, if given, their total."""
    self.done, self._total = done, total or self._total
    now = time.monotonic()
    if self._enabled and now - self._shown >= (_EVERY if self._live else _LINE_EVERY):
      self._shown = now
      line = self._line(now - self._start)
      self._stream.write(f"\r{line}\x1b[K" if self._live else f"{line}\n")
      self._stream.flush()

  def finish(self) -> None:
    """Replaces the line by the final amount, time and rate."""
    if self._enabled:
      seconds = time.monotonic() - self._start
      done = f"{human(self.done, 'B')} in {duration(seconds)}{self._rate(seconds, self._included)}"
      start, end = ("\r", "\x1b[K\n") if self._live else ("", "\n")
      self._stream.write(f"{start}{self._label}: {done}{end}")
      self._stream.flush()

  def _line(self, seconds: float) -> str:
    if not self._total:
      return f"{self._label}: {human(self.done, 'B')}{self._rate(seconds)}, {duration(seconds)}"
    left = (self._total - self.done) * seconds / self.done if self.done else math.inf
    share = f"{100 * self.done / self._total:3.0f}%"
    of = f"{human(self.done, 'B')} of {human(self._total, 'B')}"
    return f"{self._label}: {share}  {of}{self._rate(seconds)}, {duration(left)} left"

  def _rate(self, seconds: float, included: str = "") -> str:
    return f" ({human(self.done / seconds, 'B/s')}{included})" if self.done and seconds > 0 else ""
