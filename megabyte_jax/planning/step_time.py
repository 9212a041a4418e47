"""Measures the cost of training steps, two models in alternation, so that a busy or warming machine favours neither."""

from __future__ import annotations

import math
import time

import jax
import numpy as np

from megabyte_jax.config import Config
from megabyte_jax.config.model import token_dtype
from megabyte_jax.errors import require
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh
from megabyte_jax.training.state import initial_state, make_train_step


class TimedStep:
  """The compiled training step of a config, on random bytes, on the config's mesh.

  Attributes:
    bytes: bytes predicted by one step, over all devices.
    nats: loss of these bytes in the last timed step, in nats in all.
  """

  def __init__(self, config: Config):
    self.bytes = config.bytes_per_step
    self.nats = math.nan
    self.mesh = make_mesh(config.mesh)
    shape = (config.batch_size, config.model.context)
    vocab = config.model.vocab_size
    x_BT = np.random.default_rng(0).integers(0, vocab, shape, token_dtype(vocab))
    self.x_BT = jax.make_array_from_callback(shape, batch_sharding(self.mesh), lambda index: x_BT[index])
    with jax.set_mesh(self.mesh):
      self.state, self.train_step = initial_state(config, self.mesh), make_train_step(config)
    self.seconds(1)  # compiles

  def seconds(self, steps: int) -> float:
    """Runs `steps` steps and returns their wall-clock seconds.

    Raises:
      ConfigError: the loss is not finite, so that the time means nothing (chips run faster on NaN).
    """
    start = time.perf_counter()
    with jax.set_mesh(self.mesh):
      for _ in range(steps):
        self.state, metrics = self.train_step(self.state, self.x_BT)
      self.nats = float(metrics["nats"])  # waits for the steps
    seconds = time.perf_counter() - start
    require(
      math.isfinite(self.nats),
      f"the loss is {self.nats} after a few steps, so that their time means nothing; "
      "set a lower optimizer.learning_rate",
    )
    return seconds


def time_ratios(
  candidate: TimedStep, reference: TimedStep, rounds: int = 10, round_seconds: float = 0.5, warmup_seconds: float = 3.0
) -> list[float]:
  """Returns seconds per predicted byte of `candidate` relative to `reference`, one ratio per round.

  In every round both run for about `round_seconds`, one after the other and in alternating order. A disturbance of
  the whole round cancels in the ratio; the median over rounds also discards one that hit a single model.

  Args:
    candidate, reference: the two compiled steps.
    rounds: number of ratios; even numbers weigh both orders equally.
    round_seconds: time for each of the two steps in a round.
    warmup_seconds: time spent on rounds that do not count, so that clocks settle under load.
  """
  steps = {step: max(1, math.ceil(round_seconds / step.seconds(1))) for step in (candidate, reference)}

  def ratio(order: tuple[TimedStep, TimedStep]) -> float:
    cost = {step: step.seconds(steps[step]) / (steps[step] * step.bytes) for step in order}
    return cost[candidate] / cost[reference]

  until = time.perf_counter() + warmup_seconds
  while time.perf_counter() < until:
    ratio((candidate, reference))
  orders = ((candidate, reference), (reference, candidate))
  return [ratio(orders[i % 2]) for i in range(rounds)]
