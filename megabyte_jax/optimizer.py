"""AdamW with linear warm-up and decay (appendix A.1 of the paper)."""

from __future__ import annotations

import optax

from megabyte_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then linear to `end_learning_rate` at `num_steps`."""
  warmup = min(config.warmup_steps, num_steps)
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, config.learning_rate, warmup),
      optax.linear_schedule(config.learning_rate, config.end_learning_rate, num_steps - warmup),
    ],
    [warmup],
  )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW: decoupled weight decay on all parameters, as metaseq has it."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate(config, num_steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
    ),
  )
