"""Defines what a model of any family does; a new family is a subclass of `Model` in a file of its own.

Shapes: B batch, T bytes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.config import ModelConfig
from megabyte_jax.models.layers.cross_entropy import cross_entropy

Pick = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [B, V], position) -> bytes [B] int32


class Model(nnx.Module):
  """Predicts bytes from the bytes before them, whole windows at once or step by step.

  A family defines the methods that raise NotImplementedError here. Its parameters come from models/parameters.py.

  Attributes:
    config: the family's config.
  """

  config: ModelConfig

  def __call__(self, x_BT: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
    """Returns float32 logits [B, T, V] of every byte; those at t depend on x_<t alone."""
    raise NotImplementedError

  @property
  def alignment(self) -> int:
    """Inputs are padded to a multiple of this many bytes."""
    return self.config.alignment

  # --- Training and evaluation; models/loss.py has the arguments. ---

  def byte_nats(
    self,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    start_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns -ln p(x_t | x_<t) [B, T], 0 where nothing is predicted, and a mask of where something is."""
    scored_BT = counted(x_BT, length_B)
    nats_BT = cross_entropy(self(x_BT, dropout_key=dropout_key), x_BT)
    return jnp.where(scored_BT, nats_BT, 0.0), scored_BT

  def sum_of_nats(
    self,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    start_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of `byte_nats` and the number of bytes scored."""
    nats_BT, scored_BT = self.byte_nats(x_BT, length_B=length_B, start_B=start_B, dropout_key=dropout_key)
    return jnp.sum(nats_BT), jnp.sum(scored_BT)

  # --- Families with a memory across segments (`config.recurrent`), whose context T is one segment of a document. For
  # them `__call__` and `byte_nats` are a single segment after an empty memory; models/recurrent.py has the rest. ---

  def empty_memory(self, batch: int) -> Any:
    """Returns the memory before a document's first segment, as a pytree of arrays.

    Each has the batch as its first axis, over which it is spread like the rows of a batch. Among them are
    `previous_B`, int32, the token before the segment (-1: none, the document begins), and how many slots are filled.
    """
    raise NotImplementedError

  def segment(
    self,
    memory: Any,
    x_BT: jax.Array,
    *,
    fresh_B: jax.Array | None = None,
    length_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, Any, jax.Array]:
    """Reads the next segment of each row.

    No gradient flows into the memory that came in, unless a family's paper says so.

    Args:
      memory: what `empty_memory` or the segment before returned.
      x_BT: tokens, 1 <= T <= context.
      fresh_B: bool, True where a document begins: there the memory is emptied first. Default: nowhere.
      length_B: tokens of each row that count. A short row is its document's last, so that what its memory holds
        afterwards does not matter: the next one is fresh. Default: all.
      dropout_key: turns dropout on.

    Returns:
      Float32 logits [B, T, V], those at t depending on x_<t and on the memory alone; the memory after the segment;
      and a loss of the family's own, summed over the rows, float32: 0 where it has none.
    """
    raise NotImplementedError

  def segment_nats(
    self,
    memory: Any,
    x_BT: jax.Array,
    *,
    fresh_B: jax.Array | None = None,
    length_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """Returns nats and a mask [B, T] as `byte_nats`, the memory afterwards and the family's own loss as `segment`."""
    raise NotImplementedError

  # --- Generation, `config.patch_bytes` at once. ---

  def read_prompt(self, x_BT: jax.Array, length: jax.Array, latent_start: jax.Array | int = 0) -> Any:
    """Returns the state of decoding after the first `length` bytes, rounded down to `alignment`.

    Args:
      x_BT: the prompt and then anything.
      length: int32 scalar, known bytes.
      latent_start: where the latents start, in families that have some.
    """
    raise NotImplementedError

  def decode_patch(self, state: Any, pick: Pick) -> tuple[Any, jax.Array, jax.Array]:
    """Returns the state after the next S bytes, these bytes [B, S], and the logits [B, S, V] they were picked from."""
    raise NotImplementedError

  # --- Entropy coding, byte by byte. ---

  def start_bytes(self, batch: int) -> Any:
    """Returns the state before the first byte; families with latents start from `read_prompt` instead."""
    raise NotImplementedError

  def first_level_at(self, position: int) -> int:
    """Returns which levels take a step at byte `position`: those from this one on."""
    return 0

  def decode_byte(self, state: Any, previous_B: jax.Array, first_level: int = 0) -> tuple[Any, jax.Array]:
    """Returns the state for the next byte and the logits [B, V] of this one, given the byte before."""
    raise NotImplementedError


def counted(x_BT: jax.Array, length_B: jax.Array | None) -> jax.Array:
  """Returns a mask [B, T] of the bytes that count: the first `length` of each row, or all."""
  B, T = x_BT.shape
  return jnp.ones((B, T), bool) if length_B is None else jnp.arange(T) < length_B[:, None]
