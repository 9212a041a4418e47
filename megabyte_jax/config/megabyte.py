"""Describes MEGABYTE, its ablations and the byte-level Transformer; the model is models/megabyte.py."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Self

from megabyte_jax.config.counts import (
  attention_width,
  block_parameters,
  block_weights,
  from_above,
  linear_parameters,
  norm_parameters,
  output_parameters,
  visible_keys,
)
from megabyte_jax.config.levels import Level
from megabyte_jax.config.model import Attention, ModelConfig
from megabyte_jax.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class MegabyteConfig(ModelConfig):
  """Describes MEGABYTE as a list of levels; see models/megabyte.py.

  Levels with patch sizes (P, 1) are the paper's model, (1,) is the byte-level Transformer, (P,) the
  ablation without a local model, and (1,) with `span=P` the ablation without a global model.

  Attributes:
    context, vocab_size: as in `ModelConfig`.
    levels: from the coarsest to the finest; each patch size divides the one above.
    span: bytes that the first level sees together; 0 takes the whole context.
    patch_groups: the levels below the first work on the patches in so many groups, one after the other, so that only
      the first level's memory grows with the context; for very long sequences.
    parent_init: how w_i of eq. (4) is drawn: paper (as all other parameters: next to a parent's output the embeddings
      that it is added to are small then) | balanced (divided by the root of its number of inputs: both begin as large).
  """

  largest_vocab: ClassVar[int] = 1 << 20

  family: Literal["megabyte"] = "megabyte"
  levels: tuple[Level, ...]
  span: int = 0
  patch_groups: int = 1
  parent_init: Literal["paper", "balanced"] = "paper"

  @property
  def display_name(self) -> str:
    """Transformer where a single level reads bytes, else MEGABYTE."""
    return "Transformer" if [level.patch_size for level in self.levels] == [1] else "MEGABYTE"

  @property
  def reads_tokens(self) -> bool:
    """True for the Transformer, which has no patches: a patch is a fixed number of bytes, a subword is not."""
    return [level.patch_size for level in self.levels] == [1] and not self.span

  @property
  def spans(self) -> tuple[int, ...]:
    """Bytes per span of each level: S_{i-1} for level i, with S_0 the context (or `span`)."""
    return (self.span or self.context, *(level.patch_size for level in self.levels[:-1]))

  @property
  def level_names(self) -> tuple[str, ...]:
    """The paper's names of two levels."""
    return ("global", "local") if len(self.levels) == 2 else super().level_names

  @property
  def attention_shapes(self) -> tuple[tuple[int, int], ...]:
    """As in `ModelConfig`; below the first level only the spans of a group are worked on together."""
    first, *finer = super().attention_shapes
    return (first, *((-(-spans // self.patch_groups), slots) for spans, slots in finer))

  @property
  def alignment(self) -> int:
    """Bytes that belong together: a patch of the first level, or a whole span where there are several."""
    span = self.spans[0]
    return span if span < self.context else self.levels[0].patch_size

  @property
  def patch_bytes(self) -> int:
    """Bytes of a patch of the first level."""
    return self.levels[0].patch_size

  @property
  def default_stride(self) -> int:
    """Half the context in whole patches, or whole spans if `span` is set."""
    unit = self.span or self.levels[0].patch_size
    return self.context // 2 // unit * unit or max(1, self.context // 2)

  @property
  def sequence_parts(self) -> int:
    """Patches of the first level, or spans if `span` is set."""
    return self.context // max(self.levels[0].patch_size, self.span)

  def shortened(self, length: int) -> Self:
    """Returns the config for windows of at most `length` bytes, in whole patches, where the first level sees all."""
    context = -(-max(length, 1) // self.patch_bytes) * self.patch_bytes
    return self if self.span or context >= self.context else dataclasses.replace(self, context=context)

  def with_levels(self, levels: tuple[Level, ...]) -> Self:
    """Returns the same model with other sizes of its levels."""
    return dataclasses.replace(self, levels=levels)

  def parameter_count(self) -> int:
    """Returns the number of trainable parameters."""
    total, above = 0, None
    for level, span in zip(self.levels, self.spans, strict=True):
      width = level.byte_width
      total += (self.vocab_size + span) * width + level.width  # byte table, positions, pad
      total += from_above(level, above)
      total += sum(linear_parameters(self, size * width, width) for size in level.conv_filters)
      total += level.num_layers * block_parameters(self, level) + norm_parameters(self, level.width)
      above = level
    return total + output_parameters(self, self.vocab_size, self.levels[-1].byte_width)

  def flops_breakdown(self, attention: Attention) -> dict[str, float]:
    """Returns the forward operations per byte, by parts."""
    parts: dict[str, float] = {}
    above = None
    for i, (level, span) in enumerate(zip(self.levels, self.spans, strict=True)):
      size = level.patch_size
      weights = level.num_layers * block_weights(self, level) + from_above(level, above)
      parts[f"levels[{i}].weights"] = 2 * weights / size
      keys = visible_keys(level, span // size, self.context // span, attention)
      parts[f"levels[{i}].attention"] = 4 * level.num_layers * keys * attention_width(level) / size
      if level.conv_filters:
        parts[f"levels[{i}].conv"] = 2 * sum(level.conv_filters) * level.byte_width**2
      above = level
    parts["head"] = 2 * self.vocab_size * self.levels[-1].byte_width
    return parts

  def __post_init__(self):
    self.check_sizes()
    require(len(self.levels) > 0, "model.levels is empty; give at least one level")
    require(
      self.span == 0 or (self.span > 0 and self.context % self.span == 0),
      f"model.span {self.span} does not divide model.context {self.context}",
    )
    require(
      self.vocab_size <= 256 or self.reads_tokens,
      f"model.vocab_size is {self.vocab_size}, but patches are of bytes, and bytes have 1 to 256 values; subwords are "
      "for one level of patch_size 1",
    )
    require(self.patch_groups > 0, f"model.patch_groups is {self.patch_groups}; it must be at least 1")
    require(
      self.patch_groups == 1 or len(self.levels) > 1,
      f"model.patch_groups is {self.patch_groups}, but there is no level below the first; set it to 1",
    )
    require(
      self.patch_groups == 1 or not any(level.cross_patch for level in self.levels),
      f"model.patch_groups is {self.patch_groups}, but with cross-patch attention patches need the ones before them; "
      "set it to 1, or cross_patch to 0",
    )
    for i, (level, span) in enumerate(zip(self.levels, self.spans, strict=True)):
      level.check(self.level_key(i), span, has_previous_span=span < self.context)
      require(
        i == 0 or level.patch_size < span,
        f"model.levels[{i}].patch_size {level.patch_size} must be smaller than the {span} of the level above",
      )
