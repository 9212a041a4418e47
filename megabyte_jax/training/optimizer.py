"""Makes the optimizer: AdamW (appendix A.1 of the paper) or Muon, with clipped gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from megabyte_jax.config import OptimizerConfig
from megabyte_jax.parallel.backend import platform
from megabyte_jax.parallel.parameter_names import parameter_name
from megabyte_jax.training.schedule import learning_rate

# Muon's matrices by the end of their names, with the axes of the result. A layer, and each of q, k, v and of a gated
# layer's halves, is a matrix of its own.
_RESULT = {
  "qkv.kernel": (-2, -1),  # D, 3, heads, head width
  "query.kernel": (-2, -1),  # D, heads, head width
  "key_value.kernel": (-2, -1),  # D, 2, heads, head width
  "attention_out.kernel": (-1,),  # heads, head width, D
  "ff_in.kernel": (-1,),  # D, hidden or D, 2, hidden
  "ff_out.kernel": (-1,),
  "from_parent": (-1,),
}
_RMS = 0.2  # of Muon's updates, about AdamW's: one learning rate and weight decay serve both (Liu et al., 2025)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW: decoupled weight decay on all parameters, as metaseq has it.

  With `muon` the blocks' matrices get Muon's updates, scaled to AdamW's size; AdamW with Nesterov momentum changes what
  is left: tables, positions, pads, norms, biases and convolutions.
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
      muon_weight_dimension_numbers=muon_matrices,
      consistent_rms=_RMS,
    )
    update = optax.GradientTransformation(update.init, _with_bfloat16_products(update.update))
  else:
    update = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _with_bfloat16_products(update: Callable) -> Callable:
  """`update`, its matrix products in bfloat16 on GPUs (TPUs do so anyway): enough for Newton-Schulz (Jordan, 2024)."""

  def quick(*arguments):
    if platform() != "gpu":
      return update(*arguments)
    with jax.default_matmul_precision("BF16_BF16_F32"):
      return update(*arguments)

  return quick


def muon_matrices(parameters: Any) -> Any:
  """For each parameter which axes are a matrix's inputs and outputs, or None where Muon does not change it.

  All other axes count matrices, which are made orthogonal one by one.
  """

  def axes(path, leaf):
    name = parameter_name(path)
    result = next((axes for end, axes in _RESULT.items() if name.endswith(f".{end}")), None)
    if result is None:
      return None
    first = int(".blocks." in name)  # after the axis that counts layers
    inputs = (first, first + 1) if name.endswith("attention_out.kernel") else (first,)
    return optax.contrib.MuonDimensionNumbers(inputs, tuple(leaf.ndim + axis for axis in result))

  return jax.tree_util.tree_map_with_path(axes, parameters)
