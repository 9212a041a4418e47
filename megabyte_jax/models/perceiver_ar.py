"""Defines PerceiverAR (Hawthorne et al., 2022), the paper's second baseline (appendix C).

One causal cross-attention takes a long context of single bytes to the latents at its end; causal
self-attention layers follow over the latents alone. Latent n predicts byte `start + n`.

Shapes: B batch, T bytes, N latents, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.config import PerceiverARConfig
from megabyte_jax.models.family import Model, Pick, counted
from megabyte_jax.models.layers import attention as attention_lib
from megabyte_jax.models.layers.block import activate, make_ff_in, products_apart, rotate
from megabyte_jax.models.layers.cross_entropy import nats_of_outputs
from megabyte_jax.models.layers.dropout import dropout
from megabyte_jax.models.layers.stack import Cache, Stack, rematerialised
from megabyte_jax.models.parameters import make_head_norm, make_linear, make_norm
from megabyte_jax.models.patch_embedder import PatchEmbedder, check_input


class CrossAttention(nnx.Module):
  """Pre-norm cross-attention from latents to the whole context, and a feed-forward layer, each with a residual."""

  def __init__(self, config: PerceiverARConfig, rngs: nnx.Rngs):
    self.config, level = config, config.level
    width, hidden = {"width": level.width}, {"hidden": config.hidden(level)}
    heads = dict(zip(("heads", "head_dim"), level.heads, strict=True))
    out_scale = (2 * (config.num_layers + 1)) ** -0.5
    self.query_norm = make_norm(level.width, config, rngs)
    self.context_norm = make_norm(level.width, config, rngs)
    self.query = make_linear(width, heads, config, rngs)
    self.key_value = make_linear(width, {"projections": 2, **heads}, config, rngs)
    self.attention_out = make_linear(heads, width, config, rngs, scale=out_scale)
    self.ff_norm = make_norm(level.width, config, rngs)
    self.ff_in = make_ff_in(level, config, rngs)
    self.ff_out = make_linear(hidden, width, config, rngs, scale=out_scale)
    if config.qk_norm:
      self.q_norm, self.k_norm = make_head_norm(level, config, rngs), make_head_norm(level, config, rngs)

  def keys_values(self, context_B1TD: jax.Array, first_slot: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
    """Computes keys and values of context slots `first_slot` .., each [B, 1, T, H, K]."""
    k, v = products_apart(self.key_value, self.context_norm(context_B1TD))
    if self.config.qk_norm:
      k = self.k_norm(k)
    if self.config.rotary:
      k = rotate(k, first_slot + jnp.arange(k.shape[2]))
    return k, v

  def __call__(
    self,
    latents_B1ND: jax.Array,
    k_B1THK: jax.Array,
    v_B1THK: jax.Array,
    first_slot_B: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """Lets latents attend to the context up to their own slots: `first_slot`, `first_slot` + 1, ...

    Args:
      first_slot_B: of each row, or one for all.
    """
    config = self.config
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    q = self.query(self.query_norm(latents_B1ND))
    slots_BN = first_slot_B[:, None] + jnp.arange(q.shape[2])
    if config.qk_norm:
      q = self.q_norm(q)
    if config.rotary:
      q = jax.vmap(lambda q, slots: rotate(q[None], slots)[0])(q, jnp.broadcast_to(slots_BN, (len(q), q.shape[2])))
    attended = attention_lib.cross_attention(
      q,
      k_B1THK,
      v_B1THK,
      jnp.arange(k_B1THK.shape[2]) <= slots_BN[..., None],
      implementation=config.attention,
      dropout=config.attention_dropout,
      dropout_key=keys[0],
    )
    x = latents_B1ND + dropout(self.attention_out(attended), config.dropout, keys[1])
    hidden = activate(self.ff_in(self.ff_norm(x)), config)
    return x + dropout(self.ff_out(hidden), config.dropout, keys[2])


class DecodeState(NamedTuple):
  """The state of decoding between bytes.

  Attributes:
    context: keys and values of the cross-attention, one "layer" over T slots.
    latents: of the self-attention layers over the N latents.
    byte_B1: the byte before `position`.
    position: int32 scalar, bytes of the context so far.
    start: int32 scalar, where the latents start.
  """

  context: Cache
  latents: Cache
  byte_B1: jax.Array
  position: jax.Array
  start: jax.Array


class PerceiverAR(Model):
  """Predicts the last N bytes of a context."""

  config: PerceiverARConfig

  def __init__(self, config: PerceiverARConfig, rngs: nnx.Rngs):
    self.config = config
    self.embedder = PatchEmbedder(config.level, config.context, config.vocab_size, config, rngs, predicts=True)
    self.cross = CrossAttention(config, rngs)
    self.decoder = Stack(config.level, config, rngs)

  def __call__(
    self, x_BT: jax.Array, *, start_B: jax.Array | None = None, dropout_key: jax.Array | None = None
  ) -> jax.Array:
    """Computes the logits of bytes start .. start + N - 1 of each row, given all bytes before each.

    Args:
      x_BT: bytes, 1 <= T <= context.
      start_B: where each row's latents start, 0 <= start <= T - N; default T - N. With T < N all T are latents.
      dropout_key: turns dropout on.

    Returns:
      Float32 logits [B, min(N, T), V].

    Raises:
      ConfigError: x_BT is not a batch of bytes, or T is longer than the context; see `check_input`.
    """
    h_BND, _ = self._run(x_BT, start_B, dropout_key, keep=lambda k, v: None)
    return self.embedder.logits(h_BND)

  def byte_nats(
    self,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    start_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the nats of the bytes at the latents, [B, T], and a mask of these."""
    B, T = x_BT.shape
    N = min(self.config.latents, T)
    if start_B is None and length_B is not None:
      start_B = jnp.clip(length_B - N, 0, T - N)
    h_BND, _ = self._run(x_BT, start_B, dropout_key, keep=lambda k, v: None)
    at_BN = (jnp.full((B,), T - N) if start_B is None else start_B)[:, None] + jnp.arange(N)
    rows = jnp.arange(B)[:, None]
    at_latents_BN = jnp.take_along_axis(x_BT, at_BN, axis=1)
    nats_BN = nats_of_outputs(self.embedder.logits, h_BND, at_latents_BN, self.config.vocab_size)
    scored_BT = counted(x_BT, length_B) & jnp.zeros((B, T), bool).at[rows, at_BN].set(True)
    return jnp.where(scored_BT, jnp.zeros((B, T), jnp.float32).at[rows, at_BN].set(nats_BN), 0.0), scored_BT

  def _run(self, x_BT, start_B, dropout_key, keep):
    check_input(x_BT, self.config.context, self.config.vocab_size)
    T = x_BT.shape[1]
    N = min(self.config.latents, T)
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    context_B1TD = self.embedder.slots(x_BT[:, None])
    k, v = self.cross.keys_values(context_B1TD)
    if start_B is None:
      latents, start_B = context_B1TD[:, :, T - N :], jnp.array([T - N])
    else:
      cut = jax.vmap(lambda a, start: jax.lax.dynamic_slice_in_dim(a, start, N, axis=1))
      latents = cut(context_B1TD, start_B)
    graph, parameters = nnx.split(self.cross)

    def cross(parameters, *inputs):
      return nnx.merge(graph, parameters)(*inputs)

    if self.config.remat == "full":  # what "named" keeps would be all of it where attention is fused
      cross = rematerialised(cross, "full", is_in_loop=False)
    x_B1ND = cross(parameters, latents, k, v, start_B, keys[0])
    h_B1ND, kept = self.decoder(x_B1ND, dropout_key=keys[1], keep=keep)
    return h_B1ND[:, 0], (k, v, kept)

  # --- Decoding. Computed latents stay: only when all N are used does the caller read the text again with a later
  # latent_start (evaluation/windows.py), so that every byte is predicted as in the evaluation. ---

  def read_prompt(self, x_BT: jax.Array, length: jax.Array, latent_start: jax.Array | int = 0) -> DecodeState:
    """Computes the state after the first `length` bytes of x, [B, context], all processed at once.

    Args:
      latent_start: where the latents start; they serve bytes up to latent_start + N - 1, and `length` is one of these.
    """
    B = x_BT.shape[0]
    start = jnp.int32(latent_start)
    _, (k, v, kept) = self._run(x_BT, jnp.full((B,), start), None, keep=lambda k, v: (k, v))
    byte_B1 = jax.lax.dynamic_slice_in_dim(x_BT, jnp.maximum(length - 1, 0), 1, axis=1)
    return DecodeState(Cache(k[None], v[None]), Cache(*kept), byte_B1.astype(jnp.int32), jnp.int32(length), start)

  def decode_patch(self, state: DecodeState, pick: Pick) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Decodes the next byte; arguments and results as in `Megabyte.decode_patch`, with patches of one byte.

    The latents must not be used up: position < start + N.
    """
    state, logits_BV = self.decode_byte(state, state.byte_B1[:, 0])
    byte_B1 = pick(logits_BV, state.position - 1)[:, None].astype(jnp.int32)
    return state._replace(byte_B1=byte_B1), byte_B1, logits_BV[:, None]

  def decode_byte(
    self, state: DecodeState, previous_B: jax.Array, first_level: int = 0
  ) -> tuple[DecodeState, jax.Array]:
    """Computes the logits of the next byte, as `Megabyte.decode_byte` does; the latents must not be used up."""
    slot, latent = state.position, state.position - state.start
    x_B11D, _ = self.embedder.next_slot(previous_B[:, None], (), slot)
    own = self.cross.keys_values(x_B11D, slot)
    put = jax.lax.dynamic_update_slice_in_dim  # written before it is read: otherwise XLA copies it as a whole
    context = Cache(*(put(a, b[None], slot, axis=3) for a, b in zip(state.context, own, strict=True)))
    x_B11D = self.cross(x_B11D, context.k_LBNSHK[0], context.v_LBNSHK[0], slot[None])
    h_B11D, latents = self.decoder.step(x_B11D, state.latents, latent, False)
    logits_BV = self.embedder.logits(h_B11D)[:, 0, 0]
    byte_B1 = previous_B[:, None].astype(jnp.int32)
    return DecodeState(context, latents, byte_B1, state.position + 1, state.start), logits_BV
