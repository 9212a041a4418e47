"""MEGABYTE, read beside section 2 of the paper; decoding with caches is in decoding.py.

The model is a list of levels, from coarse to fine; the paper's global and local models are levels 1 and 2.
Level i cuts its input into spans of S_{i-1} bytes (S_0 is the context) and each span into M_i = S_{i-1} / S_i
slots of S_i bytes. It is a causal decoder over the slots of a span; spans are independent of each other.
The output of a slot is the input of the span of level i+1 that covers the same bytes.

In the paper's letters, for patches of P bytes of which the context has K:

  level 1, global:  N = 1 span of M = K slots, each a patch;  D = P D_G
  level 2, local:   N = K spans of M = P slots, each a byte;  D = D_L;  w_GL is its `from_parent`

Shapes: B batch, T bytes, N spans, M slots of a span, D width, V vocabulary; E the width of the parent level's output
for a span, s that of a slice of it, the part for one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.config import Level, MegabyteConfig
from megabyte_jax.models.decoding import Decoding
from megabyte_jax.models.layers import init_normal
from megabyte_jax.models.layout import constrain
from megabyte_jax.models.patch_embedder import PatchEmbedder, check_length
from megabyte_jax.models.stack import Stack


class LevelModel(nnx.Module):
  """One level: the patch embedder, the projection of the parent level's output, and the decoder."""

  def __init__(self, level: Level, span: int, parent_byte_width: int, config: MegabyteConfig, rngs: nnx.Rngs):
    self.span, self.slots_per_span = span, span // level.patch_size
    self.embedder = PatchEmbedder(level, span, config.vocab_size, config, rngs)
    if parent_byte_width:  # w_i, (S_i * d_{i-1}) x D_i, shared by all slots: w_GL of eq. (4) for the local model
      shape = (level.patch_size * parent_byte_width, level.width)
      scale = 1.0 if config.parent_init == "paper" else shape[0] ** -0.5
      self.from_parent = nnx.Param(init_normal(config, scale)(rngs.params(), shape, jnp.float32))
    self.decoder = Stack(level, config, rngs)

  def add_parent(self, slots_BNMD: jax.Array, parent_BNE: jax.Array) -> jax.Array:
    """Eq. (4): to slot j of each span, slice j of the parent's output for that span, times w_i."""
    B, N, M, _ = slots_BNMD.shape
    slices_BNMs = parent_BNE.reshape(B, N, M, self.from_parent.shape[0])
    return slots_BNMD + slices_BNMs @ self.from_parent.astype(slots_BNMD.dtype)

  def __call__(self, x_BT: jax.Array, parent_BNE: jax.Array | None, **options) -> tuple[jax.Array, Any]:
    """Eqs. (1)-(3) for the first level, (4)-(5) for the others.

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
    one_span = slots_BNMD.shape[1] == 1  # on a mesh its slots are spread over devices, of several whole spans are
    return self.decoder(constrain(slots_BNMD, "slots" if one_span else "spans"), **options)


def fold_level(dropout_key: jax.Array | None, i: int) -> jax.Array | None:
  """The dropout key of level i (from 0)."""
  return None if dropout_key is None else jax.random.fold_in(dropout_key, i)


def as_spans(h_BNMD: jax.Array) -> jax.Array:
  """The output of each slot as the input of one span of the next level: [B, N M, D]."""
  return h_BNMD.reshape(h_BNMD.shape[0], -1, h_BNMD.shape[-1])


def finer_levels(
  levels: Sequence[LevelModel], x_BT: jax.Array, h_BNE: jax.Array, dropout_key: jax.Array | None
) -> jax.Array:
  """Eqs. (4)-(6): logits [B, T, V] from the first level's output for each of the N = T / S_1 patches.

  Without cross-patch attention the patches need not be neighbours.
  """
  B, T = x_BT.shape
  for i, level in enumerate(levels[1:], start=1):
    h_BNMD, _ = level(x_BT, h_BNE, dropout_key=fold_level(dropout_key, i))
    h_BNE = as_spans(h_BNMD)
  return levels[-1].embedder.logits(h_BNE.reshape(B, T, -1))  # the output of a slot, cut into those of its bytes


class Megabyte(Decoding, nnx.Module):
  """p(x_t | x_<t) for every byte of a sequence; see `MegabyteConfig` for the models it can be."""

  def __init__(self, config: MegabyteConfig, rngs: nnx.Rngs):
    self.config = config
    parents = (0, *(level.byte_width for level in config.levels))
    self.levels = nnx.List(
      LevelModel(level, span, parent, config, rngs)
      for level, span, parent in zip(config.levels, config.spans, parents, strict=False)
    )

  def __call__(self, x_BT: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits of every byte given the bytes before it.

    Args:
      x_BT: bytes, any integer dtype, 1 <= T <= context.
      dropout_key: turns dropout on.

    Returns:
      Float32 logits [B, T, V]; those at t depend on x_<t alone.

    Raises:
      ConfigError: T is 0 or longer than the context.
    """
    h_BKD = self.first_level(x_BT, dropout_key)
    return finer_levels(self.levels, self._padded(x_BT), h_BKD, dropout_key)[:, : x_BT.shape[1]]

  def first_level(self, x_BT: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Eqs. (1)-(3): the output of each patch of S_1 bytes given the patches before it, [B, K, D].

    A partly filled last patch, or last span if there are several, is padded to a whole one.

    Raises:
      ConfigError: T is 0 or longer than the context.
    """
    check_length(x_BT.shape[1], self.config.context)
    h_BNMD, _ = self.levels[0](self._padded(x_BT), None, dropout_key=fold_level(dropout_key, 0))
    return as_spans(h_BNMD)

  @property
  def alignment(self) -> int:
    """Inputs are padded to a multiple of this many bytes: whole patches, or whole spans if there are several."""
    return self.config.alignment

  def _padded(self, x_BT: jax.Array) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % self.alignment)))
