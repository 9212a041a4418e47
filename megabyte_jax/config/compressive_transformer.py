"""Describes the Compressive Transformer (arXiv 1911.05507); the model is models/compressive_transformer.py."""

from __future__ import annotations

import dataclasses
from typing import Literal, Self

from megabyte_jax.config.counts import attention_width
from megabyte_jax.config.levels import BlockOptions
from megabyte_jax.config.model import Attention, MemoryTraffic, ModelConfig
from megabyte_jax.config.one_level import OneLevel
from megabyte_jax.config.transformer_xl import TransformerXLConfig
from megabyte_jax.errors import require

Compression = Literal["convolution", "dilated_convolution", "mean", "max", "most_used"]

DILATED_TAPS = 3  # of the dilated convolution, which the paper does not describe
_SHARED = (*OneLevel.level_fields, "norm_place", "untie", "clamp_length", "scaled_embeddings", "context", "vocab_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressiveTransformerConfig(OneLevel, ModelConfig):
  """Describes a Transformer-XL whose oldest memories are compressed instead of forgotten.

  Attributes:
    context: n_s, tokens of a segment.
    vocab_size: values of a token; up to 2^20.
    width, num_layers, num_heads, head_dim, ff_width: as in `Level`.
    memory_length: n_m, slots of the memory; whole segments.
    compressed_length: n_cm, slots of the compressed memory.
    compression_rate: c, slots of the memory that become one; it divides a segment.
    compression: f_c, how: convolution (of kernel and stride c) | dilated_convolution (one before that) | mean, max
      (pooling) | most_used (those of the slots that were attended to most).
    evaluation_memory_length, evaluation_compressed_length: n_m and n_cm in evaluation and generation; 0 takes those of
      training.
    norm_place, untie, clamp_length, scaled_embeddings: as in `TransformerXLConfig`.
  """

  largest_vocab = TransformerXLConfig.largest_vocab

  family: Literal["compressive_transformer"] = "compressive_transformer"
  width: int
  num_layers: int
  num_heads: int
  head_dim: int = 0
  ff_width: int = 0
  memory_length: int
  compressed_length: int
  compression_rate: int = 2
  compression: Compression = "convolution"
  evaluation_memory_length: int = 0
  evaluation_compressed_length: int = 0
  norm_place: Literal["post", "pre"] = "post"
  untie: bool = False
  clamp_length: int = 0
  scaled_embeddings: bool = True
  init_std: float = 0.02

  @property
  def transformer_xl(self) -> TransformerXLConfig:
    """The Transformer-XL that it is without compression, with both memories as one."""
    shared = (*_SHARED, *(field.name for field in dataclasses.fields(BlockOptions)))
    sizes = {name: getattr(self, name) for name in shared}
    return TransformerXLConfig(memory_length=self.memory_length + self.compressed_length, **sizes)

  @property
  def display_name(self) -> str:
    """Compressive Transformer."""
    return "Compressive Transformer"

  @property
  def recurrent(self) -> bool:
    """True: memories go from segment to segment."""
    return True

  @property
  def for_evaluation(self) -> Self:
    """The model with the memories that evaluation has."""
    return dataclasses.replace(
      self,
      memory_length=self.evaluation_memory_length or self.memory_length,
      compressed_length=self.evaluation_compressed_length or self.compressed_length,
    )

  @property
  def is_learned(self) -> bool:
    """True if the compression has parameters, which the attention-reconstruction loss trains."""
    return self.compression in ("convolution", "dilated_convolution")

  def parameter_count(self) -> int:
    """Returns the number of trainable parameters: those of the Transformer-XL and of each layer's compression."""
    return self.transformer_xl.parameter_count() + self.num_layers * sum(
      taps * self.width**2 + self.width * self.bias for taps in self._taps()
    )

  def _taps(self) -> tuple[int, ...]:
    """Kernel sizes of a compression's convolutions; the last has the stride c."""
    if self.compression == "convolution":
      return (self.compression_rate,)
    return (DILATED_TAPS, self.compression_rate) if self.compression == "dilated_convolution" else ()

  def flops_breakdown(self, attention: Attention) -> dict[str, float]:
    """Returns the forward operations per token, by parts, with full memories; see `TransformerXLConfig`.

    `compression.loss` is there in training alone: queries, keys and values once more, and attention of a segment to
    the slots that are compressed, and to what they become.
    """
    parts = self.transformer_xl.flops_breakdown(attention)
    if not self.is_learned:
      return parts
    heads, slots = attention_width(self.level), 1 + 1 / self.compression_rate
    taps = sum(taps if i == 0 and len(self._taps()) > 1 else 1 for i, taps in enumerate(self._taps()))
    parts["compression.weights"] = 2 * self.num_layers * taps * self.width**2
    parts["compression.loss"] = self.num_layers * heads * (2 * self.width * (1 + 2 * slots) + 4 * slots * self.context)
    return parts

  @property
  def stopped_flops(self) -> float:
    """Counts the gradients of memories, and those of the reconstruction that do not lead to the compression.

    A gradient reaches the keys, values and probabilities of compressed slots, these themselves, and the convolutions.
    """
    stopped = self.transformer_xl.stopped_flops
    if not self.is_learned:
      return stopped
    parts, heads = self.flops_breakdown("causal"), attention_width(self.level)
    of_loss = self.num_layers * heads * (4 * self.width + 6 * self.context) / self.compression_rate
    first_taps = self._taps()[0] if len(self._taps()) > 1 else 1
    return stopped + 2 * parts["compression.loss"] - of_loss + 2 * self.num_layers * first_taps * self.width**2

  @property
  def memory_traffic(self) -> MemoryTraffic:
    """Counts the Transformer-XL's and, where the compression is learned, what the reconstruction's loss compares."""
    scores, numbers = self.transformer_xl.memory_traffic
    if self.is_learned:
      compared = self.context + self.context // self.compression_rate  # slots to compress, and compressed ones
      scores += self.num_layers * self.num_heads * self.context * compared
      numbers += self.num_layers * 4 * attention_width(self.level) * compared
    return MemoryTraffic(scores, numbers)

  def __post_init__(self):
    self.check_sizes()
    require(self.compression_rate > 0, f"model.compression_rate is {self.compression_rate}; it must be at least 1")
    require(
      self.context % self.compression_rate == 0,
      f"model.context {self.context} is not a multiple of model.compression_rate {self.compression_rate}",
    )
    for name in ("memory_length", "evaluation_memory_length"):
      slots = getattr(self, name)
      require(
        slots % self.context == 0 and slots >= (self.context if name == "memory_length" else 0),
        f"model.{name} is {slots}; the memory holds whole segments, so take a multiple of model.context "
        f"({self.context})",
      )
    require(
      self.compressed_length > 0,
      f"model.compressed_length is {self.compressed_length}; it must be at least 1 (transformer_xl compresses nothing)",
    )
    slots = self.evaluation_compressed_length
    require(slots >= 0, f"model.evaluation_compressed_length is {slots}; it must not be negative")
    _ = self.transformer_xl  # checks the rest
