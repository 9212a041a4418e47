"""Defines the global and the local model: each is a level of MEGABYTE, eqs. (3) to (5); megabyte.py joins them.

Shapes: B batch, T bytes, N spans, M slots of a span, D width; E the width of the parent level's output for a span, s
that of a slice of it, the part for one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from megabyte_jax.config import Level, MegabyteConfig
from megabyte_jax.models.layers.quantised import product
from megabyte_jax.models.layers.stack import Stack
from megabyte_jax.models.parameters import make_parameter
from megabyte_jax.models.patch_embedder import PatchEmbedder
from megabyte_jax.parallel.activation_layout import lay_out, spec_of


class LevelModel(nnx.Module):
  """One level: the patch embedder, the projection of the parent level's output, and the decoder."""

  def __init__(self, level: Level, span: int, parent_byte_width: int, config: MegabyteConfig, rngs: nnx.Rngs):
    self.span, self.slots_per_span = span, span // level.patch_size
    predicts = level == config.levels[-1]
    self.embedder = PatchEmbedder(level, span, config.vocab_size, config, rngs, predicts=predicts)
    if parent_byte_width:  # w_i, (S_i * d_{i-1}) x D_i, shared by all slots: w_GL of eq. (4) for the local model
      sizes = {"parent_width": level.patch_size * parent_byte_width, "width": level.width}
      balanced = config.parent_init == "balanced"
      self.from_parent = make_parameter("matrix", sizes, config, rngs, inputs=("parent_width",), balanced=balanced)
    self.decoder = Stack(level, config, rngs)

  def add_parent(self, slots_BNMD: jax.Array, parent_BNE: jax.Array) -> jax.Array:
    """Adds to slot j of each span slice j of the parent's output for that span, times w_i (eq. 4)."""
    B, N, M, _ = slots_BNMD.shape
    slices_BNMs = parent_BNE.reshape(B, N, M, self.from_parent.shape[0])
    return slots_BNMD + product(slices_BNMs.astype(slots_BNMD.dtype), self.from_parent)

  def __call__(self, x_BT: jax.Array, parent_BNE: jax.Array | None, **options: Any) -> tuple[jax.Array, Any]:
    """Computes eqs. (1)-(3) for the first level, (4)-(5) for the others.

    Args:
      x_BT: whole spans of bytes, or the beginning of a single one.
      parent_BNE: the parent level's output for each span; None at the first level.
      options: passed on to the decoder, `Stack.__call__`.

    Returns:
      Hidden states [B, N, M, D], and what the decoder was asked to keep.
    """
    B, T = x_BT.shape
    slots_BNMD = self.embedder.slots(x_BT.reshape(B, -1, min(self.span, T)))
    if parent_BNE is not None:
      slots_BNMD = self.add_parent(slots_BNMD, parent_BNE)
    return self.decoder(lay_out(slots_BNMD, spec_of(slots_BNMD, None)), **options)


def fold_level(dropout_key: jax.Array | None, i: int) -> jax.Array | None:
  """Derives the dropout key of level i (from 0)."""
  return None if dropout_key is None else jax.random.fold_in(dropout_key, i)


def as_spans(h_BNMD: jax.Array) -> jax.Array:
  """Makes the output of each slot the input of one span of the next level: [B, N M, D]."""
  return h_BNMD.reshape(h_BNMD.shape[0], -1, h_BNMD.shape[-1])


def finer_levels(
  levels: Sequence[LevelModel], x_BT: jax.Array, h_BNE: jax.Array, dropout_key: jax.Array | None
) -> jax.Array:
  """Computes eqs. (4)-(6): logits [B, T, V] from the first level's output for each of the N = T / S_1 patches.

  Without cross-patch attention the patches need not be neighbours.
  """
  B, T = x_BT.shape
  for i, level in enumerate(levels[1:], start=1):
    h_BNMD, _ = level(x_BT, h_BNE, dropout_key=fold_level(dropout_key, i))
    h_BNE = as_spans(h_BNMD)
  return levels[-1].embedder.logits(h_BNE.reshape(B, T, -1))  # the output of a slot, cut into those of its bytes
