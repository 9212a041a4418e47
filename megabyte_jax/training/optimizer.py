"""Makes the optimizer: AdamW (appendix A.1 of the paper) or Muon, with clipped gradients."""

from __future__ import annotations

import functools
from typing import Any

import optax

from megabyte_jax.config import OptimizerConfig
from megabyte_jax.parallel.parameter_info import EMBEDDINGS, ParameterInfo, ParameterInfos, map_with_info
from megabyte_jax.training.muon import scale_by_muon
from megabyte_jax.training.schedule import learning_rate


def make_optimizer(config: OptimizerConfig, num_steps: int, infos: ParameterInfos) -> optax.GradientTransformation:
  """Makes the optimizer: clipping by the global norm, then AdamW with decoupled weight decay on all parameters.

  With `muon` matrices (the blocks', w_i, gates) get Muon's updates, scaled to AdamW's size. AdamW with Nesterov
  momentum changes what is left: tables, positions, pads, an output of its own, norms, biases and convolutions.

  Args:
    config: the optimizer and its rates.
    num_steps: of the run, for the schedule.
    infos: what the model's parameters declare (`models.build.parameter_info`).
  """
  rate = learning_rate(config, num_steps)
  decay = config.weight_decay
  adamw = functools.partial(optax.adamw, rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=decay)
  if config.name == "muon":
    orthogonal = scale_by_muon(config.momentum, config.eps, infos)
    muon = optax.chain(orthogonal, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate))
    update = optax.partition(
      {"muon": muon, "adam": adamw(nesterov=True)}, lambda parameters: map_with_info(_label, parameters, infos)
    )
  else:
    update = adamw()
  parts = [optax.clip_by_global_norm(config.clip_norm), update]
  if (config.matrix_rate, config.embedding_rate, config.level_rates) != ("same", 1.0, ()):
    parts.append(_with_own_rates(config, infos))
  return optax.chain(*parts)


def _with_own_rates(config: OptimizerConfig, infos: ParameterInfos) -> optax.GradientTransformation:
  """Returns updates, their weight decay included, times each parameter's own factor of the learning rate."""

  def own(update, info):
    return update * rate_factor(config, info)

  def scaled(updates, state, parameters=None):
    del parameters
    return map_with_info(own, updates, infos), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), scaled)


def rate_factor(config: OptimizerConfig, info: ParameterInfo) -> float:
  """Returns what a parameter's learning rate is multiplied by."""
  factor = config.level_rates[info.level] if config.level_rates else 1.0
  if info.kind in EMBEDDINGS:
    return factor * config.embedding_rate
  return factor * info.fan_in**-0.5 if config.matrix_rate == "fan_in" else factor


def _label(_: Any, info: ParameterInfo | None) -> str:
  """Returns who changes a parameter."""
  return "muon" if info is not None and info.kind == "matrix" else "adam"
