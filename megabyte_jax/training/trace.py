"""Records what the devices do in some training steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import os
from typing import Any

import jax


class Trace:
  """Records a device trace of steps first .. last in `workdir`/trace; a context manager.

  Args:
    steps: (first, last), counted from 1; () records nothing.
    workdir: of the run.
  """

  def __init__(self, steps: tuple[int, ...], workdir: str):
    self._steps, self._folder, self._on = steps, os.path.join(workdir, "trace"), False

  def __enter__(self) -> Trace:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def before(self, step: int) -> None:
    """Starts the trace if `step` is to be in it."""
    if self._steps and not self._on and self._steps[0] <= step <= self._steps[1]:
      jax.profiler.start_trace(self._folder)
      self._on = True

  def after(self, step: int, results: Any) -> None:
    """Writes the trace if `step`, which computes `results`, is the last one in it."""
    if self._on and step == self._steps[1]:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self) -> None:
    if self._on:
      self._on = False
      jax.profiler.stop_trace()
