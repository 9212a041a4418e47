"""Defines the Compressive Transformer (arXiv 1911.05507), one of the subword systems of the paper's Table 3.

A Transformer-XL whose layers' oldest remembered inputs are compressed instead of forgotten. In the lines of the paper's
Algorithm 1, for layer i after a segment of n_s tokens, with memories m and cm whose oldest slots come first:

  mem <- concat(cm_t, m_t)                 what the segment attends to, besides itself
  old_mem <- m_t[:n_s]
  new_cm <- f_c(old_mem)                   n_s / c slots
  m_{t+1} <- concat(m_t, h)[-n_m:]
  cm_{t+1} <- concat(cm_t, new_cm)[-n_cm:]

Nothing is compressed until a document has filled the memory. f_c is trained by the attention-reconstruction loss alone,
Algorithm 2: the segment's attention to new_cm shall give what its attention to old_mem gives, by content alone, and all
else is taken as it is. The loss of the language model does not reach f_c.

Shapes: B batch, T tokens of a segment (n_s), M slots of the memory (n_m), C of the compressed memory (n_cm),
J = T / c, E = C + M, S = E + T, L layers, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.config.compressive_transformer import CompressiveTransformerConfig
from megabyte_jax.models import transformer_xl
from megabyte_jax.models.family import counted
from megabyte_jax.models.layers.compression import LearnedCompression, compress_without_parameters
from megabyte_jax.models.layers.memory import filled_after, pushed
from megabyte_jax.models.layers.relative_block import RelativeBlock, SlotsOfBlock
from megabyte_jax.models.layers.stack import rematerialised
from megabyte_jax.models.parameters import compute_dtype, make_layers
from megabyte_jax.models.recurrent import Recurrent


class Memory(NamedTuple):
  """Holds what is remembered between segments.

  Attributes:
    compressed_BLCD: cm, the layers' compressed inputs, in the compute dtype.
    inputs_BLMD: m, the layers' inputs at the last M slots.
    use_BLM: float32, the attention that these have got; None unless the most used are kept.
    filled_B: int32, slots of both memories that are filled, the last ones of cm and m in a row: cm's fill when m is
      full.
    previous_B: int32, the token before the segment, -1 where the document begins.
  """

  compressed_BLCD: jax.Array
  inputs_BLMD: jax.Array
  use_BLM: jax.Array | None
  filled_B: jax.Array
  previous_B: jax.Array


class Cache(NamedTuple):
  """Holds what decoding keeps.

  Attributes:
    memory: before the segment at hand; its `previous_B` is not used.
    inputs_BLTD, use_BLS: of the segment at hand, as far as it has come.
    k_LB1SHK, v_LB1SHK: keys and values of cm, m and the segment, in this order.
  """

  memory: Memory
  inputs_BLTD: jax.Array
  use_BLS: jax.Array | None
  k_LB1SHK: jax.Array
  v_LB1SHK: jax.Array


class CompressiveTransformer(Recurrent):
  """Predicts every token of a segment from those before it and two memories.

  Attributes:
    transformer: all but the compression; its memory is cm and m in a row.
    compressions: f_c of each layer, stacked, if they have parameters.
  """

  config: CompressiveTransformerConfig

  def __init__(self, config: CompressiveTransformerConfig, rngs: nnx.Rngs):
    self.config = config
    self.transformer = transformer_xl.TransformerXL(config.transformer_xl, rngs)
    self.counts_use = config.compression == "most_used"
    if config.is_learned:
      self.compressions = make_layers(lambda rngs: LearnedCompression(config, rngs), config.num_layers, rngs)

  def empty_memory(self, batch: int) -> Memory:
    """Returns the memory before a document's first segment; see `Model.empty_memory`."""
    config, dtype = self.config, compute_dtype(self.config)
    L, C, M = config.num_layers, config.compressed_length, config.memory_length
    return Memory(
      jnp.zeros((batch, L, C, config.width), dtype),
      jnp.zeros((batch, L, M, config.width), dtype),
      jnp.zeros((batch, L, M), jnp.float32) if self.counts_use else None,
      jnp.zeros(batch, jnp.int32),
      jnp.full(batch, -1, jnp.int32),
    )

  def segment_outputs(
    self,
    memory: Memory,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next segment of each row; see `Recurrent`. Its own loss is the attention reconstruction's.

    A segment shorter than the context is its document's last: nothing is compressed after it.
    """
    h_BTD, (inputs_LBTD, use_LBS) = self.transformer.run_layers(
      x_BT, _in_a_row(memory), dropout_key, keep=lambda h, slots: jax.lax.stop_gradient((h, self._use(slots)))
    )
    inputs_BLTD, use_BLS = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), (inputs_LBTD, use_LBS))
    loss, new_BLJD = jnp.float32(0), None
    if x_BT.shape[1] == self.config.context and self.config.is_learned:
      counts_BT = counted(x_BT, length_B) & (memory.filled_B >= self.config.memory_length)[:, None]
      loss, new_BLJD = self._reconstruction(inputs_BLTD, memory.inputs_BLMD[:, :, : x_BT.shape[1]], counts_BT)
    after = self._moved(memory, inputs_BLTD, use_BLS, new_BLJD)
    return h_BTD, after._replace(previous_B=x_BT[:, -1].astype(jnp.int32)), loss

  def output_logits(self, h: jax.Array) -> jax.Array:
    """Returns the products of outputs with the tokens' table."""
    return self.transformer.embedder.logits(h)

  def _use(self, slots: SlotsOfBlock, known_T: jax.Array | None = None) -> jax.Array | None:
    """The attention that slots got from a segment, or from its known queries, [B, S]; None if nobody asks."""
    if not self.counts_use:
      return None
    use_BTS = slots.use_BTS if known_T is None else jnp.where(known_T[:, None], slots.use_BTS, 0.0)
    return jnp.sum(use_BTS, axis=1) / self.config.context

  def _compressed(self, old_BLTD: jax.Array, use_BLT: jax.Array | None) -> jax.Array:
    """new_cm, [B, L, J, D]."""
    if self.config.is_learned:
      graph, parameters = nnx.split(self.compressions)
      compress = jax.vmap(lambda of_layer, old_BTD: nnx.merge(graph, of_layer)(old_BTD), in_axes=(0, 1), out_axes=1)
      return compress(parameters, old_BLTD)
    kind, rate = self.config.compression, self.config.compression_rate
    return jax.vmap(lambda old, use: compress_without_parameters(kind, old, use, rate), 1, 1)(old_BLTD, use_BLT)

  def _moved(
    self, memory: Memory, inputs_BLTD: jax.Array, use_BLS: jax.Array | None, new_BLJD: jax.Array | None = None
  ) -> Memory:
    """The end of Algorithm 1: the memory after a segment, given its layers' inputs and the attention to all slots.

    Args:
      new_BLJD: new_cm, where it is known.
    """
    config, T = self.config, inputs_BLTD.shape[2]
    C, M = config.compressed_length, config.memory_length
    filled_B, compressed_BLCD = filled_after(memory.filled_B, T, M), memory.compressed_BLCD
    use_BLT = use_BLM = None
    if memory.use_BLM is not None and use_BLS is not None:
      use_BLM = memory.use_BLM + use_BLS[:, :, C : C + M]
      use_BLT, use_BLM = use_BLM[:, :, :T], pushed(use_BLM, use_BLS[:, :, C + M :])
    if config.context == T:
      is_full_B = memory.filled_B >= M
      if new_BLJD is None:
        new_BLJD = self._compressed(memory.inputs_BLMD[:, :, :T], use_BLT)
      longer = pushed(compressed_BLCD, jax.lax.stop_gradient(new_BLJD))
      compressed_BLCD = jnp.where(is_full_B[:, None, None, None], longer, compressed_BLCD)
      both_B = filled_after(memory.filled_B, T // config.compression_rate, C + M)
      filled_B = jnp.where(is_full_B, both_B, filled_B)
    inputs_BLMD = pushed(memory.inputs_BLMD, inputs_BLTD)
    return Memory(compressed_BLCD, inputs_BLMD, use_BLM, filled_B, memory.previous_B)

  def _reconstruction(
    self, inputs_BLTD: jax.Array, old_BLTD: jax.Array, counts_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Algorithm 2: the squared difference of what tokens read from old slots and from compressed ones.

    Returns:
      Its mean over the heads' widths, summed over the layers and over the tokens that count; and new_cm, [B, L, J, D].
    """
    graph, blocks = nnx.split(self.transformer.blocks)
    compression_graph, compressions = nnx.split(self.compressions)

    def layer(total, of_layer):
      of_block, compression, h_BTD, old_BTD = of_layer
      block: RelativeBlock = nnx.merge(graph, of_block)
      q_BTHK, (k, v) = block.queries(h_BTD), block.keys_values(old_BTD)
      new_BJD = nnx.merge(compression_graph, compression)(old_BTD)
      new_k, new_v = block.keys_values(new_BJD)
      error_BTHK = _by_content(q_BTHK, k, v) - _by_content(q_BTHK, new_k, new_v)
      return total + jnp.sum(jnp.where(counts_BT, jnp.mean(error_BTHK**2, axis=(2, 3)), 0.0)), new_BJD

    layers = (
      jax.lax.stop_gradient(blocks),
      compressions,
      *(jnp.moveaxis(jax.lax.stop_gradient(a), 1, 0) for a in (inputs_BLTD, old_BLTD)),
    )
    layer = rematerialised(layer, "full" if self.config.remat == "full" else "none", is_in_loop=True)
    loss, new_LBJD = jax.lax.scan(layer, jnp.float32(0), layers)
    return loss, jnp.moveaxis(new_LBJD, 0, 1)

  # --- Decoding: see Recurrent. ---

  def cache_after(self, memory: Memory, x_BT: jax.Array, position: jax.Array) -> Cache:
    """Returns the layers' inputs, keys and values of both memories and of the segment's slots."""
    known_T = jnp.arange(x_BT.shape[1]) < position % x_BT.shape[1]

    def keep(h, slots):
      return h, self._use(slots, known_T), slots.k_BSHK[:, None], slots.v_BSHK[:, None]

    _, kept = self.transformer.run_layers(x_BT, _in_a_row(memory), None, keep=keep)
    inputs_BLTD, use_BLS = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), kept[:2])
    return Cache(memory, inputs_BLTD, use_BLS, *kept[2:])

  def decode_token(self, cache: Cache, previous_B: jax.Array, position: jax.Array) -> tuple[Cache, jax.Array]:
    """Returns the cache after a token's slot, and its logits [B, V]; after a segment's last, the memories move on."""
    T, S = self.config.context, cache.k_LB1SHK.shape[3]
    E, slot = S - T, position % T
    filled = self._filled_after(position // T)
    distance_S = E + slot - jnp.arange(S)
    visible_S = (distance_S > 0) & (jnp.arange(S) >= E - filled)

    def keep(h, own):
      return h, self._use(own), own.k_BSHK[:, None], own.v_BSHK[:, None]

    earlier = transformer_xl.Cache(cache.k_LB1SHK, cache.v_LB1SHK)
    h_B1D, new = self.transformer.run_token(previous_B, earlier, visible_S, distance_S, keep=keep)
    put, (inputs_LB1D, use_LBs, k_LB11HK, v_LB11HK) = jax.lax.dynamic_update_slice_in_dim, new
    inputs_BLTD = put(cache.inputs_BLTD, jnp.moveaxis(inputs_LB1D, 0, 1), slot, axis=2)
    use_BLS = cache.use_BLS
    if use_BLS is not None:
      use_BLs = jnp.moveaxis(use_LBs, 0, 1)  # of S earlier slots, and then of its own
      use_BLS = (use_BLS + use_BLs[..., :S]).at[:, :, E + slot].add(use_BLs[..., S])
    k_LB1SHK = put(cache.k_LB1SHK, k_LB11HK, E + slot, axis=3)
    v_LB1SHK = put(cache.v_LB1SHK, v_LB11HK, E + slot, axis=3)
    after = Cache(cache.memory, inputs_BLTD, use_BLS, k_LB1SHK, v_LB1SHK)
    after = jax.lax.cond(slot == T - 1, lambda: self._next_segment(after), lambda: after)
    return after, self.output_logits(h_B1D)[:, 0]

  def _filled_after(self, segments: jax.Array) -> jax.Array:
    """Returns how many slots of both memories are filled after so many segments of a document."""
    config = self.config
    late = jnp.maximum(segments - config.memory_length // config.context, 0)
    compressed = jnp.minimum(late * (config.context // config.compression_rate), config.compressed_length)
    return jnp.minimum(segments * config.context, config.memory_length) + compressed

  def _next_segment(self, cache: Cache) -> Cache:
    """The cache before the first slot of the next segment."""
    memory = self._moved(cache.memory, cache.inputs_BLTD, cache.use_BLS)
    graph, blocks = nnx.split(self.transformer.blocks)

    def layer(of_layer):
      parameters, earlier_BED = of_layer
      return nnx.merge(graph, parameters).keys_values(earlier_BED)

    both = jax.lax.map(layer, (blocks, jnp.moveaxis(_in_a_row(memory).inputs_BLMD, 1, 0)))
    put = jax.lax.dynamic_update_slice_in_dim
    k_LB1SHK, v_LB1SHK = (
      put(old, new[:, :, None], 0, axis=3) for old, new in zip((cache.k_LB1SHK, cache.v_LB1SHK), both, strict=True)
    )
    return Cache(memory, cache.inputs_BLTD, jax.tree.map(jnp.zeros_like, cache.use_BLS), k_LB1SHK, v_LB1SHK)


def _in_a_row(memory: Memory) -> transformer_xl.Memory:
  """mem: both memories as one."""
  inputs_BLED = jnp.concatenate([memory.compressed_BLCD, memory.inputs_BLMD], axis=2)
  return transformer_xl.Memory(inputs_BLED, memory.filled_B, memory.previous_B)


def _by_content(q_BTHK: jax.Array, k_BJHK: jax.Array, v_BJHK: jax.Array) -> jax.Array:
  """Algorithm 2's attention: every query sees every slot, and positions play no part; float32 [B, T, H, K]."""
  scores = jnp.einsum("BTHK,BJHK->BHTJ", q_BTHK, k_BJHK, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scores * q_BTHK.shape[-1] ** -0.5, axis=-1).astype(v_BJHK.dtype)
  return jnp.einsum("BHTJ,BJHK->BTHK", weights, v_BJHK, preferred_element_type=jnp.float32)
