"""Defines MEGABYTE, to be read beside section 2 of the paper.

A level, eqs. (3)-(5), is in global_and_local.py, decoding with caches in decoding.py.

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

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.config import MegabyteConfig
from megabyte_jax.models.decoding import Decoding
from megabyte_jax.models.family import counted
from megabyte_jax.models.global_and_local import LevelModel, as_spans, finer_levels, fold_level
from megabyte_jax.models.layers.cross_entropy import nats_of_outputs
from megabyte_jax.models.parameters import of_level
from megabyte_jax.models.patch_embedder import check_input
from megabyte_jax.models.patch_groups import PatchGroups


class Megabyte(Decoding, PatchGroups):
  """Predicts every byte of a sequence; see `MegabyteConfig` for the models it can be."""

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
    """Computes the logits of every byte given the bytes before it.

    Args:
      x_BT: bytes, any integer dtype, 1 <= T <= context.
      dropout_key: turns dropout on.

    Returns:
      Float32 logits [B, T, V]; those at t depend on x_<t alone.

    Raises:
      ConfigError: x_BT is not a batch of bytes, or T is longer than the context; see `check_input`.
    """
    h_BKD = self.first_level(x_BT, dropout_key)
    return finer_levels(self.levels, self._padded(x_BT), h_BKD, dropout_key)[:, : x_BT.shape[1]]

  def byte_nats(
    self,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    start_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the nats of every byte, 0 where none counts, and which count, [B, T]; see `Model.byte_nats`."""
    if len(self.levels) > 1:
      return super().byte_nats(x_BT, length_B=length_B, dropout_key=dropout_key)
    h_BKD, scored_BT = self.first_level(x_BT, dropout_key), counted(x_BT, length_B)
    h_BTd = h_BKD.reshape(len(x_BT), -1, self.config.levels[0].byte_width)[:, : x_BT.shape[1]]
    nats_BT = nats_of_outputs(self.levels[0].embedder.logits, h_BTd, x_BT, self.config.vocab_size)
    return jnp.where(scored_BT, nats_BT, 0.0), scored_BT

  def first_level(self, x_BT: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Computes eqs. (1)-(3): the output of each patch of S_1 bytes given the patches before it, [B, K, D].

    A partly filled last patch, or last span if there are several, is padded to a whole one.

    Raises:
      ConfigError: x_BT is not a batch of bytes, or T is longer than the context; see `check_input`.
    """
    check_input(x_BT, self.config.context, self.config.vocab_size)
    h_BNMD, _ = self.levels[0](self._padded(x_BT), None, dropout_key=fold_level(dropout_key, 0))
    return as_spans(h_BNMD)

  def _padded(self, x_BT: jax.Array) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % self.alignment)))
