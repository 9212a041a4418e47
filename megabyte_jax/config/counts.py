"""Counts the parameters and products of a level in closed form, for the families' own counts (see models/flops.py)."""

from __future__ import annotations

from megabyte_jax.config.levels import BlockOptions, Level
from megabyte_jax.config.model import Attention


def attention_width(level: Level) -> int:
  """Returns the width of all heads together: the level's own unless head_dim says otherwise."""
  heads, head_dim = level.heads
  return heads * head_dim


def block_weights(options: BlockOptions, level: Level) -> int:
  """Counts the entries of a block's matrices: queries, keys, values, output, and the feed-forward layer's 2 or 3."""
  return 4 * level.width * attention_width(level) + (2 + options.gated) * level.width * options.hidden(level)


def block_parameters(options: BlockOptions, level: Level) -> int:
  """Counts a block's matrices, biases, two norms, and the scales of queries and keys."""
  biases = (3 * attention_width(level) + (1 + options.gated) * options.hidden(level) + 2 * level.width) * options.bias
  scales = 2 * level.heads[1] * options.qk_norm
  return block_weights(options, level) + biases + 2 * norm_parameters(options, level.width) + scales


def relative_block_weights(options: BlockOptions, level: Level) -> int:
  """Counts the entries of the matrices of a block with relative positions: those of distances come on top."""
  return block_weights(options, level) + level.width * attention_width(level)


def relative_block_parameters(options: BlockOptions, level: Level, *, untie: bool) -> int:
  """Counts such a block's matrices, biases (of the feed-forward layer alone), two norms, scales, and own u and v."""
  biases = ((1 + options.gated) * options.hidden(level) + level.width) * options.bias
  scales = 2 * level.heads[1] * options.qk_norm
  own = relative_block_weights(options, level) + biases + scales + 2 * attention_width(level) * untie
  return own + 2 * norm_parameters(options, level.width)


def norm_parameters(options: BlockOptions, width: int) -> int:
  """Counts the scales of one norm, and its shifts where LayerNorm has them."""
  return width * (2 if options.norm == "layernorm" and options.bias else 1)


def linear_parameters(options: BlockOptions, inputs: int, outputs: int) -> int:
  """Counts the parameters of one linear map."""
  return inputs * outputs + outputs * options.bias


def output_parameters(options: BlockOptions, vocab_size: int, width: int) -> int:
  """Counts the entries of the output's own matrix: none where the output is the byte table."""
  return 0 if options.tied_output else vocab_size * width


def from_above(level: Level, above: Level | None) -> int:
  """Counts the entries of w_i, from the slice of the level above for one slot to its width; no bias (eq. 4)."""
  return 0 if above is None else level.patch_size * above.byte_width * level.width


def visible_keys(level: Level, slots: int, spans: int, attention: Attention) -> float:
  """Returns the keys that a query meets on average, in its span of `slots` and the `cross_patch` slots before it."""
  window = min(level.attention_window or slots, slots)
  if attention == "causal":
    return window - window**2 / (2 * slots) + level.cross_patch
  if attention == "whole":
    return window + level.cross_patch
  blocked = spans == 1 and slots % window == 0  # blocks of `window` that also see the block before (attention.py)
  return (min(2 * window, slots) if blocked else slots) + level.cross_patch
