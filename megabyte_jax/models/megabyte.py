"""MEGABYTE, read beside section 2 of the paper; a level is in level.py, decoding with caches in decoding.py.

The model is a list of levels, from coarse to fine; the paper's global and local models are levels 1 and 2.
Level i cuts its input into spans of S_{i-1} bytes (S_0 is the context) and each span into M_i = S_{i-1} / S_i
slots of S_i bytes. It is a causal decoder over the slots of a span; spans are independent of each other.
The output of a slot is the input of the span of level i+1 that covers the same bytes.

In the paper's letters, for patches of P bytes of which the context has K:

  level 1, global:  N = 1 span of M = K slots, each a patch;  D = P D_G
  level 2, local:   N = K spans of M = P slots, each a byte;  D = D_L;  w_GL is its `from_parent`

Shapes: B batch, T bytes, N spans, M slots of a span, D width, V vocabulary; E the width of a level's output for
a span of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.config import MegabyteConfig
from megabyte_jax.models.decoding import Decoding
from megabyte_jax.models.level import LevelModel
from megabyte_jax.models.parameters import of_level
from megabyte_jax.models.patch_embedder import check_length


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
    for i, level in enumerate(self.levels):
      of_level(level, i)

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
