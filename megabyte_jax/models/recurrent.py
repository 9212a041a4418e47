"""Defines what recurrent families share: a single segment as a window, and decoding token by token.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megabyte_jax.models.family import Model, Pick, counted
from megabyte_jax.models.layers.cross_entropy import nats_of_outputs
from megabyte_jax.models.layers.memory import emptied
from megabyte_jax.models.patch_embedder import check_input


class DecodeState(NamedTuple):
  """The state of decoding between tokens.

  Attributes:
    cache: of the family: its memory and the slots of the segment at hand. Arrays have the batch as their first axis;
      those of six axes [L, B, N, S, H, K] as the second.
    token_B: int32, the token before `position`.
    position: int32 scalar, tokens of the document so far.
  """

  cache: Any
  token_B: jax.Array
  position: jax.Array


class Recurrent(Model):
  """Predicts the tokens of a document segment after segment.

  A family defines `empty_memory`, `segment_outputs`, `output_logits`, `cache_after` and `decode_token`.
  """

  def segment_outputs(
    self,
    memory: Any,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, Any, jax.Array]:
    """Returns what `Model.segment` does, with the last layer's normed outputs [B, T, D] instead of logits.

    The memory is emptied already where a document begins, and is a constant; the tokens have been looked at.
    """
    raise NotImplementedError

  def output_logits(self, h: jax.Array) -> jax.Array:
    """Returns the float32 logits [..., V] of such outputs [..., D]."""
    raise NotImplementedError

  def _outputs(
    self, memory: Any, x_BT: jax.Array, fresh_B: jax.Array | None = None, **options: Any
  ) -> tuple[jax.Array, Any, jax.Array]:
    """Looks at the tokens, empties memories where documents begin, and stops gradients before `segment_outputs`."""
    check_input(x_BT, self.config.context, self.config.vocab_size)
    memory = emptied(jax.lax.stop_gradient(memory), self.empty_memory(x_BT.shape[0]), fresh_B)
    return self.segment_outputs(memory, x_BT, **options)

  def segment(self, memory: Any, x_BT: jax.Array, **options: Any) -> tuple[jax.Array, Any, jax.Array]:
    """Reads the next segment of each row; see `Model.segment`."""
    h_BTD, memory, extra = self._outputs(memory, x_BT, **options)
    return self.output_logits(h_BTD), memory, extra

  def segment_nats(
    self, memory: Any, x_BT: jax.Array, *, length_B: jax.Array | None = None, **options: Any
  ) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """Returns nats, a mask, the memory and the family's own loss; see `Model.segment_nats`.

    Logits of large vocabularies are never in memory together; see `nats_of_outputs`.
    """
    h_BTD, memory, extra = self._outputs(memory, x_BT, length_B=length_B, **options)
    scored_BT = counted(x_BT, length_B)
    nats_BT = nats_of_outputs(self.output_logits, h_BTD, x_BT, self.config.vocab_size)
    return jnp.where(scored_BT, nats_BT, 0.0), scored_BT, memory, extra

  def cache_after(self, memory: Any, x_BT: jax.Array, position: jax.Array) -> Any:
    """Returns the cache of decoding within a segment.

    Args:
      memory: before the segment.
      x_BT: its tokens, T = context; those from slot `position` % T on are anything, and must not matter.
      position: int32 scalar, tokens of the document so far.
    """
    raise NotImplementedError

  def decode_token(self, cache: Any, previous_B: jax.Array, position: jax.Array) -> tuple[Any, jax.Array]:
    """Returns the cache after slot `position` % T, and the logits [B, V] of token `position`.

    After the last slot of a segment the memory moves on as `segment` moves it.

    Args:
      cache: after the slots before.
      previous_B: int32, the token before; -1 at position 0.
      position: int32 scalar.
    """
    raise NotImplementedError

  def __call__(self, x_BT: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
    """Returns float32 logits [B, T, V] of a document's first segment; those at t depend on x_<t alone.

    Raises:
      ConfigError: x_BT is not a batch of tokens, or T is longer than the context; see `check_input`.
    """
    check_input(x_BT, self.config.context, self.config.vocab_size)
    return self.segment(self.empty_memory(x_BT.shape[0]), x_BT, dropout_key=dropout_key)[0]

  def read_prompt(self, x_BT: jax.Array, length: jax.Array, latent_start: jax.Array | int = 0) -> DecodeState:
    """Returns the state after the first `length` tokens.

    Args:
      x_BT: the document's beginning and then anything, of any length.
      length: int32 scalar.
      latent_start: of other families.
    """
    B, context = x_BT.shape[0], self.config.context
    x_BT = jnp.pad(x_BT.astype(jnp.int32), ((0, 0), (0, -x_BT.shape[1] % context)))

    def read(number: jax.Array, memory: Any) -> Any:
      return self.segment(memory, jax.lax.dynamic_slice_in_dim(x_BT, number * context, context, axis=1))[1]

    whole = length // context  # segments
    memory = jax.lax.fori_loop(0, whole, read, self.empty_memory(B))
    part_BT = jax.lax.dynamic_slice_in_dim(x_BT, whole * context, context, axis=1)
    token_B = jax.lax.dynamic_index_in_dim(x_BT, jnp.maximum(length - 1, 0), 1, keepdims=False)
    position = jnp.int32(length)
    return DecodeState(self.cache_after(memory, part_BT, position), token_B, position)

  def start_bytes(self, batch: int) -> DecodeState:
    """Returns the state before the first token."""
    return self.read_prompt(jnp.zeros((batch, self.config.context), jnp.int32), jnp.int32(0))

  def decode_patch(self, state: DecodeState, pick: Pick) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Returns the state after the next token, this token [B, 1], and the logits [B, 1, V] it was picked from."""
    after, logits_BV = self.decode_byte(state, state.token_B)
    token_B = pick(logits_BV, state.position).astype(jnp.int32)
    return after._replace(token_B=token_B), token_B[:, None], logits_BV[:, None]

  def decode_byte(
    self, state: DecodeState, previous_B: jax.Array, first_level: int = 0
  ) -> tuple[DecodeState, jax.Array]:
    """Returns the state for the next token and the logits [B, V] of this one, given the token before."""
    previous_B = jnp.where(state.position == 0, -1, previous_B.astype(jnp.int32))
    cache, logits_BV = self.decode_token(state.cache, previous_B, state.position)
    return DecodeState(cache, previous_B, state.position + 1), logits_BV
