"""Defines Transformer-XL (Dai et al., 2019; arXiv 1901.02860), to be read beside its equations.

They are those of the section on relative positional encodings.

For segment tau and layer n of N, with SG for a stopped gradient and [a o b] for slots a, then slots b:

  h~_tau^{n-1} = [SG(m_tau^{n-1}) o h_tau^{n-1}]                                          earlier slots and own ones
  q = h_tau^{n-1} W_q,   k = h~_tau^{n-1} W_k,E,   v = h~_tau^{n-1} W_v
  A_{i,j} = q_i k_j + q_i W_k,R R_{i-j} + u k_j + v W_k,R R_{i-j}                         terms (a) to (d)
  a = masked softmax(A / sqrt(K)) v
  o = LayerNorm(Linear(a) + h_tau^{n-1}),   h_tau^n = LayerNorm(feed-forward(o) + o)

The memory m^{n-1} holds the last M inputs of layer n. Slot t of a segment is embedded from the token before its own, so
that logits at t depend on earlier tokens alone.

Shapes: B batch, T slots of a segment, M of the memory, S = M + T, L layers, D width, H heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from megabyte_jax.config import TransformerXLConfig
from megabyte_jax.models.layers.dropout import dropout
from megabyte_jax.models.layers.memory import filled_after, filled_slots, pushed
from megabyte_jax.models.layers.relative_block import Offsets, RelativeBlock, SlotsOfBlock, make_offsets, sinusoids
from megabyte_jax.models.layers.stack import rematerialised, scans_layers
from megabyte_jax.models.layers.token_embedder import TokenEmbedder
from megabyte_jax.models.parameters import compute_dtype, make_layers, make_norm
from megabyte_jax.models.recurrent import Recurrent
from megabyte_jax.parallel.activation_layout import BATCH, lay_out


class Memory(NamedTuple):
  """Memory that is kept between segments.

  Attributes:
    inputs_BLMD: the layers' inputs at the last M slots, in the compute dtype.
    filled_B: int32, how many of them there have been since the document began.
    previous_B: int32, the token before the segment, -1 where the document begins.
  """

  inputs_BLMD: jax.Array
  filled_B: jax.Array
  previous_B: jax.Array


class Cache(NamedTuple):
  """Keys and values of all layers in a ring of S slots: the slot of token p is p % S; [L, B, 1, S, H, K] each."""

  k_LBNSHK: jax.Array
  v_LBNSHK: jax.Array


class TransformerXL(Recurrent):
  """Predicts every token of a segment from those before it and the memory."""

  config: TransformerXLConfig

  def __init__(self, config: TransformerXLConfig, rngs: nnx.Rngs):
    self.config, level = config, config.level
    scale = config.width**0.5 if config.scaled_embeddings else 1.0
    self.embedder = TokenEmbedder(config.vocab_size, config.width, config, rngs, scale=scale)
    kind: dict[str, bool] = {"pre_norm": config.norm_place == "pre", "untie": config.untie}
    self.blocks = make_layers(lambda rngs: RelativeBlock(level, config, rngs, **kind), config.num_layers, rngs)
    if not config.untie:
      self.u, self.v = make_offsets(level, config, rngs)
    if config.norm_place == "pre":
      self.norm = make_norm(config.width, config, rngs)

  def empty_memory(self, batch: int) -> Memory:
    """Returns the memory before a document's first segment; see `Model.empty_memory`."""
    config = self.config
    shape = (batch, config.num_layers, config.memory_length, config.width)
    inputs = jnp.zeros(shape, compute_dtype(config))
    return Memory(inputs, jnp.zeros(batch, jnp.int32), jnp.full(batch, -1, jnp.int32))

  def segment_outputs(
    self,
    memory: Memory,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next segment of each row; see `Recurrent`. There is no loss of its own."""
    T, M = x_BT.shape[1], memory.inputs_BLMD.shape[2]
    h_BTD, inputs_LBTD = self.run_layers(x_BT, memory, dropout_key, keep=lambda h, slots: jax.lax.stop_gradient(h))
    inputs_BLMD = pushed(memory.inputs_BLMD, jnp.moveaxis(inputs_LBTD, 0, 1))
    after = Memory(inputs_BLMD, filled_after(memory.filled_B, T, M), x_BT[:, -1].astype(jnp.int32))
    return h_BTD, after, jnp.float32(0)

  def output_logits(self, h: jax.Array) -> jax.Array:
    """Returns the products of outputs with the tokens' table."""
    return self.embedder.logits(h)

  def run_layers(
    self,
    x_BT: jax.Array,
    memory: Memory,
    dropout_key: jax.Array | None,
    keep: Callable[[jax.Array, SlotsOfBlock], Any],
  ) -> tuple[jax.Array, Any]:
    """Runs the layers over a segment.

    Returns:
      Hidden states [B, T, D]; and of each layer, stacked, keep(its input [B, T, D], keys, values and use of all slots).
    """
    config, T, M = self.config, x_BT.shape[1], memory.inputs_BLMD.shape[2]
    keys = (None,) * 4 if dropout_key is None else jax.random.split(dropout_key, 4)
    h_BTD = dropout(self.embedder.inputs(x_BT, memory.previous_B), config.dropout, keys[0])
    R_SD = dropout(self._sinusoids(jnp.arange(M + T)[::-1]), config.dropout, keys[1])
    distance_TS = M + jnp.arange(T)[:, None] - jnp.arange(M + T)
    filled_BS = jnp.pad(filled_slots(memory.filled_B, M), ((0, 0), (0, T)), constant_values=True)
    visible_BTS = filled_BS[:, None] & (distance_TS >= 0) & (distance_TS < self._sight(T))
    offsets = self._offsets()
    graph, layers = nnx.split(self.blocks)
    layer_keys = None if keys[2] is None else jax.random.split(keys[2], config.num_layers)

    def layer(h_BTD, of_layer):
      parameters, earlier_BMD, key = of_layer
      h_BTD = lay_out(h_BTD, P(BATCH, None, None))
      out_BTD, slots = nnx.merge(graph, parameters)(
        h_BTD, earlier_BMD, visible_BTS=visible_BTS, R_SD=R_SD, offsets=offsets, dropout_key=key
      )
      return out_BTD, keep(h_BTD, slots)

    scans = scans_layers(config)
    layer = rematerialised(layer, config.remat, is_in_loop=scans)
    of_layers = layers, jnp.moveaxis(memory.inputs_BLMD, 1, 0), layer_keys
    h_BTD, kept = jax.lax.scan(layer, h_BTD, of_layers, unroll=1 if scans else config.num_layers)
    return dropout(self._last_norm(h_BTD), config.dropout, keys[3]), kept

  def _sinusoids(self, distances_S: jax.Array) -> jax.Array:
    """R of the distances, clamped, in the compute dtype; [S, D]."""
    config = self.config
    if config.clamp_length:
      distances_S = jnp.minimum(distances_S, config.clamp_length)
    return sinusoids(distances_S, config.width).astype(compute_dtype(config))

  def _sight(self, T: int) -> int:
    """Returns how many slots a slot sees at most, itself among them."""
    return self.config.memory_length if self.config.same_length else self.config.memory_length + T

  def _offsets(self) -> Offsets | None:
    return None if self.config.untie else Offsets(self.u[...], self.v[...])

  def _last_norm(self, h: jax.Array) -> jax.Array:
    return self.norm(h) if self.config.norm_place == "pre" else h

  # --- Decoding: see Recurrent. ---

  def cache_after(self, memory: Memory, x_BT: jax.Array, position: jax.Array) -> Cache:
    """Returns keys and values of the memory and of the segment's slots, each at its place in the ring."""
    _, kept = self.run_layers(x_BT, memory, None, keep=lambda h, slots: slots[:2])
    T, M = x_BT.shape[1], memory.inputs_BLMD.shape[2]
    first = position // T * T - M  # the token of the memory's first slot
    return Cache(*(jnp.roll(a, first % (M + T), axis=2)[:, :, None] for a in kept))

  def decode_token(self, cache: Cache, previous_B: jax.Array, position: jax.Array) -> tuple[Cache, jax.Array]:
    """Returns the cache after a token's slot, and its logits [B, V].

    Nothing moves in the ring where a segment ends: slots before the memory of the next one are no longer visible.
    """
    T, S = self.config.context, cache.k_LBNSHK.shape[3]
    place = position % S
    distance_S = (position - jnp.arange(S)) % S
    segment_start = position // T * T
    reach = position - jnp.maximum(segment_start - (S - T), 0)  # to the first slot of the memory, or the document
    visible_S = (distance_S > 0) & (distance_S <= reach) & (distance_S < self._sight(T))
    h_B1D, new = self.run_token(previous_B, cache, visible_S, distance_S, keep=lambda h, own: own[:2])
    put = jax.lax.dynamic_update_slice_in_dim
    cache = Cache(*(put(a, b[:, :, None], place, axis=3) for a, b in zip(cache, new, strict=True)))
    return cache, self.embedder.logits(h_B1D)[:, 0]

  def run_token(
    self,
    previous_B: jax.Array,
    cache: Cache,
    visible_S: jax.Array,
    distance_S: jax.Array,
    keep: Callable[[jax.Array, SlotsOfBlock], Any],
  ) -> tuple[jax.Array, Any]:
    """Runs the layers over one token's slot.

    Args:
      previous_B: int32, the token before; -1 where the document begins.
      cache: keys and values of earlier slots, in any order.
      visible_S: bool, which of them it sees.
      distance_S: how far back they are.
      keep: as in `run_layers`; the keys and values are the slot's own, [B, 1, H, K].

    Returns:
      Hidden states [B, 1, D]; and what is kept of each layer, stacked.
    """
    R_SD, offsets = self._sinusoids(jnp.append(distance_S, 0)), self._offsets()
    graph, layers = nnx.split(self.blocks)

    def layer(h_B1D, of_layer):
      parameters, k_BNSHK, v_BNSHK = of_layer
      block = nnx.merge(graph, parameters)
      out_B1D, own = block.step(h_B1D, k_BNSHK[:, 0], v_BNSHK[:, 0], visible_S=visible_S, R_SD=R_SD, offsets=offsets)
      return out_B1D, keep(h_B1D, own)

    # The scan reads the caches alone: what it wrote to would be copied as a whole, once for every layer.
    h_B1D, kept = jax.lax.scan(layer, self.embedder(previous_B[:, None]), (layers, *cache))
    return self._last_norm(h_B1D), kept
