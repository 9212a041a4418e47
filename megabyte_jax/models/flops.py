"""Counts floating-point operations of every model, in closed form.

The counts of a family are methods of its config (config/), those of a level are in config/counts.py.

A multiplication and its addition are two operations; norms, activations, softmax and look-ups are not counted.
Training is three times the forward pass (backward does each product twice) without what stopped gradients save
(`ModelConfig.stopped_flops`: in recurrent families alone); recomputation is not counted.

`attention` says which products of queries with keys, and of probabilities with values, count:

  causal   those that a causal mask leaves: 2 L T D per token, half of the square. Fig. 3 of the paper, every
           TFLOP/s and every fraction of peak that this project prints.
  dense    the whole square, 4 L T D per token: what XLA reports for the matrix products it runs.
  whole    as dense, but of a sliding window its own width alone: as SpaceByte counts (Slagle, 2024).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megabyte_jax.config import Level, ModelConfig
from megabyte_jax.config.model import Attention
from megabyte_jax.errors import require

TRAINING_FACTOR = 3


class StandardSize(NamedTuple):
  """A row of Table 14 (the sizes of GPT-3)."""

  nominal: float  # parameters
  layers: int
  heads: int


STANDARD_SIZES = {  # by width
  768: StandardSize(125e6, 12, 12),
  1024: StandardSize(350e6, 24, 16),
  1536: StandardSize(760e6, 24, 16),
  2048: StandardSize(1.3e9, 24, 32),
  2560: StandardSize(2.7e9, 32, 32),
  4096: StandardSize(6.7e9, 32, 32),
}


def flops_per_byte(
  config: ModelConfig, context: int | None = None, attention: Attention = "causal", *, training: bool = False
) -> float:
  """Returns the operations per predicted byte, of the forward pass or of a training step.

  Args:
    context: length of the input in bytes; None takes the model's. PerceiverAR predicts its last
      `latents` bytes, and the prefix is paid for by them.

  Raises:
    ConfigError: the model cannot have this context.
  """
  forward = sum(flops_breakdown(config, context, attention).values())
  return TRAINING_FACTOR * forward - _of_context(config, context).stopped_flops if training else forward


def flops_breakdown(
  config: ModelConfig, context: int | None = None, attention: Attention = "causal"
) -> dict[str, float]:
  """Returns the parts of `flops_per_byte` (forward) by name, such as `levels[0].weights` and `head`."""
  require(attention in ("causal", "dense", "whole"), f"attention is {attention!r}; choose 'causal', 'dense' or 'whole'")
  return _of_context(config, context).flops_breakdown(attention)


def _of_context(config: ModelConfig, context: int | None) -> ModelConfig:
  return config if context is None else dataclasses.replace(config, context=context)


def nominal_parameters(level: Level) -> float | None:
  """Names a size as the paper does: a GPT-3 size (Table 14) x layers / its layers; None for other widths.

  A width within 1% of a standard one, rounded so that the patch size divides it, counts as that one.
  """
  for width, (size, layers, _) in STANDARD_SIZES.items():
    if abs(level.width - width) <= 0.01 * width:
      return size * level.num_layers / layers
  return None


def transformer_flops(num_layers: int, width: int, length: float) -> float:
  """Returns forward operations per token of a Transformer: 2N + 2 L T D, N = 12 L D^2 (Fig. 3; Kaplan et al., 2020)."""
  return 24 * num_layers * width**2 + 2 * num_layers * length * width


def linear_transformer_flops(num_layers: int, width: int) -> float:
  """Returns those of a linear Transformer, whose attention is taken as 9 D per layer (Fig. 3; section 3.1)."""
  return 24 * num_layers * width**2 + 9 * num_layers * width


def megabyte_flops(
  global_shape: tuple[int, int], local_shape: tuple[int, int], patch_size: int, length: float
) -> float:
  """Returns those of MEGABYTE with (layers, width) of its two models; no embeddings, w_GL or head (Fig. 3)."""
  return transformer_flops(*global_shape, length / patch_size) / patch_size + transformer_flops(
    *local_shape, patch_size
  )


def figure3_curves() -> dict[str, tuple[list[int], list[float]]]:
  """Returns the curves of Fig. 3: name -> (sequence lengths, forward operations per token), P = 8.

  For the two smaller sizes the shapes are those that reproduce the figure; the text of section 3.1 names others.
  """
  lengths = [2**n for n in range(8, 21)]
  curves = {}
  for name, shape in {"604M": (12, 2048), "6.4B": (32, 4096), "173B": (96, 12_288)}.items():
    curves[f"Transformer {name}"] = (lengths, [transformer_flops(*shape, length) for length in lengths])
    curves[f"Linear Transformer {name}"] = (lengths, [linear_transformer_flops(*shape)] * len(lengths))
  for name, global_shape, local_shape in (
    ("616M", (12, 2048), (4, 512)),
    ("6.5B", (32, 4096), (12, 1024)),
    ("173B", (94, 12_288), (16, 4096)),
  ):
    values = [megabyte_flops(global_shape, local_shape, 8, length) for length in lengths]
    curves[f"MEGABYTE {name}"] = (lengths, values)
  return curves
