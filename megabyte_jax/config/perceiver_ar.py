"""Describes PerceiverAR, the paper's second baseline; the model is models/perceiver_ar.py."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from megabyte_jax.config.counts import (
  attention_width,
  block_parameters,
  block_weights,
  norm_parameters,
  output_parameters,
)
from megabyte_jax.config.model import Attention, CrossAttention, ModelConfig
from megabyte_jax.config.one_level import OneLevel
from megabyte_jax.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceiverARConfig(OneLevel, ModelConfig):
  """Describes the PerceiverAR baseline (appendix C of the paper); see models/perceiver_ar.py.

  Attributes:
    context: T, the longest input in bytes: a prefix and then the latents.
    vocab_size: as in `ModelConfig`.
    latents: N, the last positions of the input, whose next bytes are predicted.
    width, num_layers, num_heads, head_dim, ff_width, rotary: as in `Level`; the cross-attention
      layer comes on top of `num_layers` self-attention layers.
  """

  largest_vocab: ClassVar[int] = 1 << 20
  level_fields: ClassVar[tuple[str, ...]] = (*OneLevel.level_fields, "rotary")

  family: Literal["perceiver_ar"] = "perceiver_ar"
  latents: int
  width: int
  num_layers: int
  num_heads: int
  head_dim: int = 0
  ff_width: int = 0
  rotary: bool = False

  @property
  def display_name(self) -> str:
    """PerceiverAR."""
    return "PerceiverAR"

  @property
  def level_names(self) -> tuple[str, ...]:
    """The self-attention layers, as `cross` is the layer before."""
    return ("latents",)

  @property
  def num_latents(self) -> int:
    """N."""
    return self.latents

  @property
  def spans(self) -> tuple[int, ...]:
    """The latents, which see each other."""
    return (self.latents,)

  @property
  def slots(self) -> tuple[int, ...]:
    """The latents."""
    return (self.latents,)

  @property
  def cross_attention(self) -> CrossAttention:
    """The layer from the latents to the whole input."""
    return CrossAttention(self.latents, self.context - self.latents / 2, self.num_heads, self.width)

  def parameter_count(self) -> int:
    """Returns the number of trainable parameters."""
    embeddings = (self.vocab_size + self.context + 1) * self.width  # + 1: the pad
    embeddings += output_parameters(self, self.vocab_size, self.width)
    block, norm = block_parameters(self, self.level), norm_parameters(self, self.width)
    return embeddings + (norm + block) + self.num_layers * block + norm  # queries' and keys' norms are apart

  def flops_breakdown(self, attention: Attention) -> dict[str, float]:
    """Returns the forward operations per latent, by parts; keys and values of the cross-attention cover the input."""
    level, context, latents = self.level, self.context, self.latents
    heads, weights = attention_width(level), block_weights(self, level)
    keys_and_values = 2 * self.width * heads
    own = latents / 2 if attention == "causal" else latents
    return {
      "cross.weights": 2 * (weights + keys_and_values * (context / latents - 1)),
      "cross.attention": 4 * (context - latents + own) * heads,
      "latents.weights": 2 * self.num_layers * weights,
      "latents.attention": 4 * self.num_layers * own * heads,
      "head": 2 * self.vocab_size * self.width,
    }

  def __post_init__(self):
    self.check_sizes()
    require(
      1 <= self.latents <= self.context,
      f"model.latents is {self.latents}; it must be between 1 and model.context ({self.context})",
    )
    self.level.check(self.level_key(0), self.context, has_previous_span=False)
