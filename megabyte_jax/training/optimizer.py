"""Makes the optimizer: AdamW (appendix A.1 of the paper) or Muon, with clipped gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from megabyte_jax.config import OptimizerConfig
from megabyte_jax.parallel.backend import platform
from megabyte_jax.parallel.parameter_info import EMBEDDINGS, ParameterInfo, ParameterInfos, map_with_info
from megabyte_jax.training.schedule import learning_rate

_RMS = 0.2  # of Muon's updates, about AdamW's: one learning rate and weight decay serve both (Liu et al., 2025)


def make_optimizer(config: OptimizerConfig, num_steps: int, infos: ParameterInfos) -> optax.GradientTransformation:
  """Makes the optimizer: clipping by the global norm, then AdamW with decoupled weight decay on all parameters.

  With `muon` the blocks' matrices get Muon's updates, scaled to AdamW's size; AdamW with Nesterov momentum changes what
  is left: tables, positions, pads, norms, biases and convolutions.

  Args:
    num_steps: of the run, for the schedule.
    infos: what the model's parameters declare (`models.build.parameter_info`).
  """
  rate = learning_rate(config, num_steps)
  if config.name == "muon":
    update = optax.contrib.muon(
      rate,
      beta=config.momentum,
      eps=config.eps,
      weight_decay=config.weight_decay,
      adam_b1=config.b1,
      adam_b2=config.b2,
      adam_weight_decay=config.weight_decay,
      muon_weight_dimension_numbers=functools.partial(muon_matrices, infos=infos),
      consistent_rms=_RMS,
    )
    update = optax.GradientTransformation(update.init, _with_bfloat16_products(update.update))
  else:
    update = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
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


def _with_bfloat16_products(update: Callable) -> Callable:
  """`update`, its matrix products in bfloat16 on GPUs (TPUs do so anyway): enough for Newton-Schulz (Jordan, 2024)."""

  def quick(*arguments):
    if platform() != "gpu":
      return update(*arguments)
    with jax.default_matmul_precision("BF16_BF16_F32"):
      return update(*arguments)

  return quick


def muon_matrices(parameters: Any, infos: ParameterInfos) -> Any:
  """Returns for each parameter which axes are a matrix's inputs and outputs, or None where Muon does not change it.

  All other axes count matrices, which are made orthogonal one by one.
  """

  def axes(_, info):
    if info.kind != "matrix":
      return None
    return optax.contrib.MuonDimensionNumbers(info.input_places, info.output_places)

  return map_with_info(axes, parameters, infos)
