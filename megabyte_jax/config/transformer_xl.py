"""Describes Transformer-XL (Dai et al., 2019; arXiv 1901.02860); the model is models/transformer_xl.py."""

from __future__ import annotations

import dataclasses
from typing import Literal, Self

from megabyte_jax.config.counts import (
  attention_width,
  norm_parameters,
  output_parameters,
  relative_block_parameters,
  relative_block_weights,
)
from megabyte_jax.config.model import Attention, MemoryTraffic, ModelConfig
from megabyte_jax.config.one_level import OneLevel
from megabyte_jax.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(OneLevel, ModelConfig):
  """Describes a Transformer over segments that remembers the segments before; see models/transformer_xl.py.

  Defaults are the original's: post-norm, ReLU, embeddings times the root of the width, matrices of deviation 0.02.

  Attributes:
    context: T, tokens of a segment.
    vocab_size: values of a token; up to 2^20.
    width, num_layers, num_heads, head_dim, ff_width: as in `Level`.
    memory_length: M, the slots before the segment whose layers' inputs are remembered.
    evaluation_memory_length: M in evaluation and generation; 0 takes memory_length.
    norm_place: post (after each sum) | pre (before attention and feed-forward, and after the last block).
    untie: whether each layer has vectors u and v of its own.
    same_length: every slot sees itself and the M - 1 slots before it, instead of all that there are.
    clamp_length: distances from so many slots on count as this one; 0 lets them be.
    scaled_embeddings: whether embeddings are multiplied by the root of the width.
  """

  largest_vocab = 1 << 20

  family: Literal["transformer_xl"] = "transformer_xl"
  width: int
  num_layers: int
  num_heads: int
  head_dim: int = 0
  ff_width: int = 0
  memory_length: int
  evaluation_memory_length: int = 0
  norm_place: Literal["post", "pre"] = "post"
  untie: bool = False
  same_length: bool = False
  clamp_length: int = 0
  scaled_embeddings: bool = True
  init_std: float = 0.02

  @property
  def display_name(self) -> str:
    """Transformer-XL."""
    return "Transformer-XL"

  @property
  def recurrent(self) -> bool:
    """True."""
    return True

  @property
  def for_evaluation(self) -> Self:
    """The model with the memory that evaluation has."""
    return dataclasses.replace(self, memory_length=self.evaluation_memory_length or self.memory_length)

  def parameter_count(self) -> int:
    """Returns the number of trainable parameters."""
    embeddings = (self.vocab_size + 1) * self.width  # + 1: the pad
    embeddings += output_parameters(self, self.vocab_size, self.width)
    blocks = self.num_layers * relative_block_parameters(self, self.level, untie=self.untie)
    shared = 0 if self.untie else 2 * attention_width(self.level)
    return embeddings + blocks + shared + norm_parameters(self, self.width) * (self.norm_place == "pre")

  def flops_breakdown(self, attention: Attention) -> dict[str, float]:
    """Returns the forward operations per token, by parts, with a full memory.

    Keys and values of the memory are computed anew for each segment. A query has a product with each key and one with
    each distance. The products of W_R with the distances are not counted: all rows of a batch share them.
    """
    level, heads = self.level, attention_width(self.level)
    weights = relative_block_weights(self, level) - self.width * heads
    of_memory = 2 * self.width * heads * self.memory_length / self.context
    keys = self.memory_length + (self.context / 2 if attention == "causal" else self.context)
    if self.same_length and attention != "dense":
      keys = self.memory_length
    return {
      "layers.weights": 2 * self.num_layers * (weights + of_memory),
      "layers.attention": 6 * self.num_layers * keys * heads,
      "head": 2 * self.vocab_size * self.width,
    }

  @property
  def stopped_flops(self) -> float:
    """Counts the gradients of the memory, which its keys and values would give; their matrices do get theirs.

    In pre-norm blocks they are made: the norm before the keys, whose scale is trained, needs them.
    """
    if self.norm_place == "pre":
      return 0.0
    return 4 * self.num_layers * self.width * attention_width(self.level) * self.memory_length / self.context

  @property
  def memory_traffic(self) -> MemoryTraffic:
    """Counts scores of all slots, by content and by distance, and the memory with its keys and values."""
    slots, heads = self.context + self.memory_length, self.num_heads
    scores = self.num_layers * 2 * heads * self.context * slots
    of_slot = 2 * self.width + 4 * attention_width(self.level)  # keys and values are written, then read
    return MemoryTraffic(scores, self.num_layers * self.memory_length * of_slot)

  def __post_init__(self):
    self.check_sizes()
    for name in ("memory_length", "evaluation_memory_length", "clamp_length"):
      require(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must not be negative")
    require(
      not self.same_length or self.memory_length > 0,
      "model.same_length lets a slot see model.memory_length slots; make that at least 1",
    )
    require(self.width % 2 == 0, f"model.width is {self.width}; half of it are sines, so make it even")
    require(
      self.attention in ("auto", "xla"),
      f"model.attention={self.attention} has no relative positions; take model.attention=auto",
    )
    self.level.check(self.level_key(0), self.context, has_previous_span=False)
