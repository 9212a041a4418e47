"""Parameters and floating-point operations of every model, in closed form.

A multiplication and its addition are two operations; norms, activations, softmax and look-ups are not counted.
Training is three times the forward pass (backward does each product twice); recomputation is not counted.

`attention` says which products of queries with keys, and of probabilities with values, count:

  causal   those that a causal mask leaves: 2 L T D per token, half of the square. Fig. 3 of the paper, every
           TFLOP/s and every fraction of peak that this project prints.
  dense    the whole square, 4 L T D per token: what XLA reports for the matrix products it runs.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from megabyte_jax.config import BlockOptions, Level, ModelConfig, PerceiverARConfig
from megabyte_jax.errors import require

Attention = Literal["causal", "dense"]

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


def parameter_count(config: ModelConfig) -> int:
  """All trainable parameters: tables, positions, pads, biases and norms included."""
  if isinstance(config, PerceiverARConfig):
    width = config.width
    embeddings = (config.vocab_size + config.context + 1) * width  # + 1: the pad
    cross = _norm(config, width) + _block_parameters(config, config.level)  # one norm more: queries and keys apart
    blocks = config.num_layers * _block_parameters(config, config.level)
    return embeddings + cross + blocks + _norm(config, width)
  total, above = 0, None
  for level, span in zip(config.levels, config.spans, strict=True):
    width = level.byte_width
    total += (config.vocab_size + span) * width + level.width  # byte table, positions, pad
    total += _from_above(level, above)
    total += sum(_linear(config, size * width, width) for size in level.conv_filters)
    total += level.num_layers * _block_parameters(config, level) + _norm(config, level.width)
    above = level
  return total


def predicted_bytes(config: ModelConfig) -> int:
  """Bytes that a training window predicts: all of them, but for PerceiverAR only its latents'."""
  return config.latents if isinstance(config, PerceiverARConfig) else config.context


def flops_per_byte(
  config: ModelConfig, context: int | None = None, attention: Attention = "causal", *, training: bool = False
) -> float:
  """Operations per predicted byte, of the forward pass or of a training step (3x).

  Args:
    context: length of the input in bytes; None takes the model's. PerceiverAR predicts its last
      `latents` bytes, and the prefix is paid for by them.

  Raises:
    ConfigError: the model cannot have this context.
  """
  total = sum(flops_breakdown(config, context, attention).values())
  return total * (TRAINING_FACTOR if training else 1)


def flops_breakdown(
  config: ModelConfig, context: int | None = None, attention: Attention = "causal"
) -> dict[str, float]:
  """The parts of `flops_per_byte` (forward), by name: `levels[0].weights`, `levels[0].attention`, ..., `head`."""
  require(attention in ("causal", "dense"), f"attention is {attention!r}; choose 'causal' or 'dense'")
  if context is not None:
    config = dataclasses.replace(config, context=context)
  if isinstance(config, PerceiverARConfig):
    return _perceiver_breakdown(config, attention)
  parts: dict[str, float] = {}
  above = None
  for i, (level, span) in enumerate(zip(config.levels, config.spans, strict=True)):
    size = level.patch_size
    weights = level.num_layers * _block_weights(config, level) + _from_above(level, above)
    parts[f"levels[{i}].weights"] = 2 * weights / size
    keys = _visible_keys(level, span // size, config.context // span, attention)
    parts[f"levels[{i}].attention"] = 4 * level.num_layers * keys * _attention_width(level) / size
    if level.conv_filters:
      parts[f"levels[{i}].conv"] = 2 * sum(level.conv_filters) * level.byte_width**2
    above = level
  parts["head"] = 2 * config.vocab_size * config.levels[-1].byte_width
  return parts


def nominal_parameters(level: Level) -> float | None:
  """The paper's way of naming sizes: a GPT-3 size (Table 14) x layers / its layers; None for other widths.

  A width within 1% of a standard one, rounded so that the patch size divides it, counts as that one.
  """
  for width, (size, layers, _) in STANDARD_SIZES.items():
    if abs(level.width - width) <= 0.01 * width:
      return size * level.num_layers / layers
  return None


def transformer_flops(num_layers: int, width: int, length: float) -> float:
  """Fig. 3: forward operations per token of a Transformer, 2N + 2 L T D with N = 12 L D^2 (Kaplan et al., 2020)."""
  return 24 * num_layers * width**2 + 2 * num_layers * length * width


def linear_transformer_flops(num_layers: int, width: int) -> float:
  """Fig. 3: per token of a linear Transformer, whose attention is taken as 9 D per layer (section 3.1)."""
  return 24 * num_layers * width**2 + 9 * num_layers * width


def megabyte_flops(
  global_shape: tuple[int, int], local_shape: tuple[int, int], patch_size: int, length: float
) -> float:
  """Fig. 3: per byte of MEGABYTE with (layers, width) of its two models; no embeddings, w_GL or head."""
  return transformer_flops(*global_shape, length / patch_size) / patch_size + transformer_flops(
    *local_shape, patch_size
  )


def figure3_curves() -> dict[str, tuple[list[int], list[float]]]:
  """Fig. 3: name -> (sequence lengths, forward operations per token), P = 8.

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


def _attention_width(level: Level) -> int:
  """Width of all heads together; the same as the level's width unless head_dim says otherwise."""
  heads, head_dim = level.heads
  return heads * head_dim


def _block_weights(config: BlockOptions, level: Level) -> int:
  """Entries of a block's matrices: queries, keys, values, output, and the feed-forward layer's 2, or 3 if gated."""
  return 4 * level.width * _attention_width(level) + (2 + config.gated) * level.width * config.hidden(level)


def _block_parameters(config: BlockOptions, level: Level) -> int:
  """A block's matrices, biases, two norms, and the scales of queries and keys."""
  biases = (3 * _attention_width(level) + (1 + config.gated) * config.hidden(level) + 2 * level.width) * config.bias
  scales = 2 * level.heads[1] * config.qk_norm
  return _block_weights(config, level) + biases + 2 * _norm(config, level.width) + scales


def _norm(config: BlockOptions, width: int) -> int:
  """Parameters of one norm: scales, and shifts where LayerNorm has them."""
  return width * (2 if config.norm == "layernorm" and config.bias else 1)


def _linear(config: BlockOptions, inputs: int, outputs: int) -> int:
  """Parameters of one linear map."""
  return inputs * outputs + outputs * config.bias


def _from_above(level: Level, above: Level | None) -> int:
  """Entries of w_i, from the slice of the level above that belongs to one slot to its width; no bias (eq. 4)."""
  return 0 if above is None else level.patch_size * above.byte_width * level.width


def _visible_keys(level: Level, slots: int, spans: int, attention: Attention) -> float:
  """Keys that a query meets on average, in its span of `slots` and the `cross_patch` slots before it."""
  window = min(level.attention_window or slots, slots)
  if attention == "causal":
    return window - window**2 / (2 * slots) + level.cross_patch
  blocked = spans == 1 and slots % window == 0  # blocks of `window` that also see the block before (attention.py)
  return (min(2 * window, slots) if blocked else slots) + level.cross_patch


def _perceiver_breakdown(config: PerceiverARConfig, attention: Attention) -> dict[str, float]:
  """Per latent: the cross-attention layer, whose keys and values cover the whole input, and the layers above."""
  level, context, latents = config.level, config.context, config.latents
  heads = _attention_width(level)
  keys_and_values = 2 * config.width * heads
  cross = _block_weights(config, level) + keys_and_values * (context / latents - 1)
  own = latents if attention == "dense" else latents / 2
  return {
    "cross.weights": 2 * cross,
    "cross.attention": 4 * (context - latents + own) * heads,
    "latents.weights": 2 * config.num_layers * _block_weights(config, level),
    "latents.attention": 4 * config.num_layers * own * heads,
    "head": 2 * config.vocab_size * config.width,
  }
