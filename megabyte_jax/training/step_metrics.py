"""Reads the metrics of training steps, which may still be under way, and logs them."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.config import Config
from megabyte_jax.display.metrics import Metrics
from megabyte_jax.training.saving import check_finite
from megabyte_jax.training.schedule import learning_rate


class StepMetrics:
  """Metrics of steps whose results may still be under way, and the sums since the last progress line."""

  def __init__(
    self,
    config: Config,
    metrics: Metrics,
    checkpoints: Checkpoints,
    first_step: int,
    since_logged: Sequence[float] = (0.0, 0.0, 0.0),
  ):
    """Continues the sums of a run.

    Args:
      metrics: where lines go.
      checkpoints: named in the error where a number is not finite.
      first_step: steps done when this process began.
      since_logged: nats, bytes and tokens (bytes again, unless the model reads subwords) since the last progress line,
        as `since_logged` of a checkpoint's meta has them.
    """
    self._config, self._metrics, self._checkpoints, self._first_step = config, metrics, checkpoints, first_step
    self._schedule = learning_rate(config.optimizer, config.num_steps)
    self._waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    self._nats, self._bytes, self._tokens = since_logged

  def put(self, step: int, values: dict[str, jax.Array]) -> None:
    """Takes what `make_train_step`'s function returned for `step`; waits for nothing."""
    self._waiting.append((step, values))

  def read(self, leave: int = 0) -> None:
    """Reads and logs the metrics of all steps but the newest `leave`.

    Raises:
      FloatingPointError: a number is not finite.
    """
    while len(self._waiting) > leave:
      step, arrays = self._waiting.popleft()
      values = {name: float(array) for name, array in arrays.items()}
      check_finite(step, values, self._checkpoints)
      if step == self._first_step + 1:
        self._metrics.start(step)  # speed is measured from here on: compilation is over
      self._nats, self._bytes = self._nats + values["nats"], self._bytes + values["bytes"]
      self._tokens += values.get("tokens", values["bytes"])
      if step % self._config.log_every == 0 or step == self._config.num_steps:
        rate = float(self._schedule(step - 1))
        self._metrics.log(
          step,
          loss=self._nats / self._bytes,
          learning_rate=rate,
          grad_norm=values["grad_norm"],
          bytes_per_token=self._bytes / self._tokens if "tokens" in values else None,
        )
        if values.get("extra_loss"):
          self._metrics.write(step, {"extra_loss": values["extra_loss"] / values["bytes"]})
        self._nats = self._bytes = self._tokens = 0.0

  def so_far(self) -> dict[str, object]:
    """Returns what a checkpoint's meta says of the steps read: `seconds` of the run and the sums `since_logged`."""
    return {"seconds": self._metrics.seconds, "since_logged": [self._nats, self._bytes, self._tokens]}
