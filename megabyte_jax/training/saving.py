"""Saves a run's state, once its numbers are known to be finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.config import Config
from megabyte_jax.training.state import TrainState

_norm = jax.jit(optax.tree.norm)


def is_due(step: int, config: Config, checkpoints: Checkpoints) -> bool:
  """Returns True if `step` is to be saved: the last one, one that is evaluated next for `keep_best`, or by the rules.

  All processes must call it at every step; see `Checkpoints.should_save`.
  """
  evaluated = bool(config.eval.every_steps) and step % config.eval.every_steps == 0
  candidate = bool(config.checkpoint.keep_best) and evaluated
  return candidate or step == config.num_steps or checkpoints.should_save(step)


def save(checkpoints: Checkpoints, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
  """Starts to save `state` after `step` steps; see `Checkpoints.save`.

  Raises:
    FloatingPointError: the parameters are not finite; nothing is saved then.
  """
  check_finite(step, {"parameter_norm": float(_norm(state.parameters))}, checkpoints)
  checkpoints.save(step, state.parameters, state.beside_parameters, meta)


def check_finite(step: int, values: Mapping[str, float], checkpoints: Checkpoints) -> None:
  """Ends a run whose numbers are broken, before they reach a checkpoint.

  Raises:
    FloatingPointError: a value is not finite; names it, the last good checkpoint and what to change.
  """
  broken = ", ".join(f"{name} {value}" for name, value in values.items() if not np.isfinite(value))
  if not broken:
    return
  checkpoints.wait()
  good, workdir = checkpoints.latest_step(), checkpoints.workdir
  raise FloatingPointError(
    f"the numbers broke down at step {step}: {broken}. "
    + (f"The last good checkpoint, of step {good}, is kept in {workdir}. " if good else "No checkpoint was saved yet. ")
    + "Lower config.optimizer.learning_rate or raise config.optimizer.warmup_steps, and start anew in another --workdir"
    + (f" (with --init_from={workdir} from that checkpoint's parameters)" if good else "")
  )
