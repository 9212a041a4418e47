"""Defines what families with one stack of layers over single bytes or tokens answer alike."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self, cast

from megabyte_jax.config.levels import Level


class OneLevel:
  """Describes the only level of a family by fields of its config; to be named before `ModelConfig` among its bases."""

  level_fields: ClassVar[tuple[str, ...]] = ("width", "num_layers", "num_heads", "head_dim", "ff_width")

  context: int

  def level_key(self, i: int) -> str:
    """Returns `model`: the only level's sizes are the model's own."""
    return "model"

  @property
  def level(self) -> Level:
    """The layers, described as a level of single bytes or tokens."""
    return Level(patch_size=1, **{name: getattr(self, name) for name in self.level_fields})

  @property
  def levels(self) -> tuple[Level, ...]:
    """The one level."""
    return (self.level,)

  @property
  def level_names(self) -> tuple[str, ...]:
    """The layers."""
    return ("layers",)

  @property
  def spans(self) -> tuple[int, ...]:
    """The context; of recurrent families, the segment."""
    return (self.context,)

  def with_levels(self, levels: tuple[Level, ...]) -> Self:
    """Returns the same model with other sizes of its only level."""
    return dataclasses.replace(cast(Any, self), **self.sizes_of(levels))

  def sizes_of(self, levels: tuple[Level, ...]) -> dict[str, Any]:
    """Returns the config's fields for other sizes of its only level."""
    [level] = levels
    return {name: getattr(level, name) for name in self.level_fields}
