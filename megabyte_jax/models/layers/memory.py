"""Keeps what is remembered of earlier segments in arrays of fixed size, whose newest slots come last.

Shapes: B batch, M slots of a memory, T slots of a segment.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def emptied(memory: Tree, empty: Tree, fresh_B: jax.Array | None) -> Tree:
  """Returns `memory` with the rows of `empty` where `fresh_B` is True; all arrays have the batch as first axis."""
  if fresh_B is None:
    return memory

  def choose(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(fresh_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

  return jax.tree.map(choose, memory, empty)


def pushed(memory_BLM: jax.Array, new_BLT: jax.Array) -> jax.Array:
  """Returns the memory, [B, L, M, ..], after `new` has come in at its end and as much has left it at its front."""
  joined = jnp.concatenate([memory_BLM, new_BLT.astype(memory_BLM.dtype)], axis=2)
  return joined[:, :, joined.shape[2] - memory_BLM.shape[2] :]


def filled_after(filled_B: jax.Array, new: int, slots: int) -> jax.Array:
  """Returns how many of a memory's slots are filled, int32 [B], after `new` more; there are `slots`."""
  return jnp.minimum(filled_B + new, slots)


def filled_slots(filled_B: jax.Array, slots: int) -> jax.Array:
  """Returns which slots of a memory are filled, bool [B, M]: the last ones."""
  return jnp.arange(slots) >= slots - filled_B[:, None]
