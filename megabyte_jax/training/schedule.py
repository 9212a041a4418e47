"""Defines the learning-rate schedules: warm-up, then linear, (half) cosine, warm-up-stable-decay or constant."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import optax

from megabyte_jax.config import Config, OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns the learning rate by step: linear from 0 over `warmup_steps`, then as `config.schedule` says.

  The paper has linear decay (appendix A.1). All but `constant` end at `end_learning_rate` at step `num_steps`.
  """
  warmup = min(config.warmup_steps, num_steps)
  peak, end, left = config.learning_rate, config.end_learning_rate, num_steps - warmup
  pieces, boundaries = [optax.linear_schedule(0.0, peak, warmup)], [warmup]
  if config.schedule == "constant":
    pieces.append(optax.constant_schedule(peak))
  elif config.schedule == "cosine":
    pieces.append(optax.cosine_decay_schedule(peak, max(1, left), alpha=end / peak))
  elif config.schedule == "half_cosine":
    pieces.append(lambda step: end + (peak - end) * jnp.cos(0.5 * math.pi * jnp.clip(step / max(1, left), 0, 1)))
  else:
    decay = left if config.schedule == "linear" else min(left, round(config.decay_share * num_steps))
    if decay < left:
      pieces.append(optax.constant_schedule(peak))
      boundaries.append(num_steps - decay)
    pieces.append(optax.linear_schedule(peak, end, decay))
  return optax.join_schedules(pieces, boundaries)


def same_rates(before: Config, now: Config, steps: int) -> bool:
  """Tells whether two runs have the same learning rate at each of their first `steps` steps."""
  if before.num_steps == now.num_steps and before.optimizer == now.optimizer:
    return True
  numbers = np.arange(steps)
  then, today = (np.asarray(learning_rate(run.optimizer, run.num_steps)(numbers)) for run in (before, now))
  return np.array_equal(then, today)
