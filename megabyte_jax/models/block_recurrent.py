"""Defines the Block-Recurrent Transformer (arXiv 2203.07852), one of the subword systems of the paper's Table 3.

Tokens attend within a sliding window of W tokens, whose keys and values go from segment to segment. In recurrent layers
(layers/recurrent_cell.py) S state vectors go along the text, too: after every W tokens they attend to these and to
themselves, and the next W tokens attend to them. Gradients flow through the windows of a segment, and stop where it
begins; the learned first states are trained where a document begins.

Shapes: B batch, T tokens, N windows, W tokens of a window, D width, V vocabulary, L layers, C recurrent layers,
S states, H heads, K head width, R the 2 W tokens of a decoding cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from megabyte_jax.config import BlockRecurrentConfig
from megabyte_jax.models.layers.memory import filled_after
from megabyte_jax.models.layers.recurrent_cell import Cell, TokenLayer
from megabyte_jax.models.layers.stack import rematerialised, scans_layers
from megabyte_jax.models.layers.token_embedder import TokenEmbedder
from megabyte_jax.models.layers.unit_attention import attend, bias_by_distance, in_windows
from megabyte_jax.models.parameters import compute_dtype, make_layers, make_norm
from megabyte_jax.models.recurrent import Recurrent
from megabyte_jax.parallel.activation_layout import BATCH, lay_out


class Memory(NamedTuple):
  """Holds what goes from one segment of a document to the next.

  Attributes:
    previous_B: int32, the token before the segment; -1 where a document begins.
    filled_B: int32, tokens of the last window that are there: none or all of them, fewer within short documents.
    k_BLWHK, v_BLWHK: keys and values of the last window, of each layer.
    states_BCSD: float32; where a document begins the learned first states are taken instead.
  """

  previous_B: jax.Array
  filled_B: jax.Array
  k_BLWHK: jax.Array
  v_BLWHK: jax.Array
  states_BCSD: jax.Array


class Cache(NamedTuple):
  """Holds what decoding keeps of the tokens before.

  Attributes:
    k_LB1RHK, v_LB1RHK: keys and values of the last tokens in a ring: that of token t is slot `t % R`.
    states_BCSD: float32, as the window at hand reads them.
    k_BCSHK, v_BCSHK: keys and values of these states.
  """

  k_LB1RHK: jax.Array
  v_LB1RHK: jax.Array
  states_BCSD: jax.Array
  k_BCSHK: jax.Array
  v_BCSHK: jax.Array


def _with_previous(own_BNWHK: jax.Array, past_BWHK: jax.Array) -> jax.Array:
  """Keys or values of each window after those of the one before it, [B, N, 2 W, H, K]."""
  before = jnp.concatenate([past_BWHK[:, None], own_BNWHK[:, :-1]], axis=1)
  return jnp.concatenate([before, own_BNWHK], axis=2)


def _of_last_window(own: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
  """Keys and values [B, W, H, K] of the last of N windows."""
  return tuple(a[:, -1] for a in own)


class BlockRecurrent(Recurrent):
  """Predicts every token of a document, segment by segment."""

  config: BlockRecurrentConfig

  def __init__(self, config: BlockRecurrentConfig, rngs: nnx.Rngs):
    self.config = config
    self.embedder = TokenEmbedder(config.vocab_size, config.width, config, rngs)
    self.blocks = make_layers(lambda rngs: TokenLayer(config, rngs), config.num_layers, rngs)
    self.cells = make_layers(lambda rngs: Cell(config, rngs), len(config.cells), rngs)
    self.norm = make_norm(config.width, config, rngs)

  def empty_memory(self, batch: int) -> Memory:
    """Returns the memory before a document's first segment; as in `Model`."""
    config, (heads, width) = self.config, self.config.level.heads
    cache = jnp.zeros((batch, config.num_layers, config.window, heads, width), compute_dtype(config))
    states = jnp.zeros((batch, len(config.cells), config.states, config.width), jnp.float32)
    return Memory(jnp.full(batch, -1, jnp.int32), jnp.zeros(batch, jnp.int32), cache, cache, states)

  def segment_outputs(
    self,
    memory: Memory,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, Memory, jax.Array]:
    """Reads the next segment of each row; see `Recurrent`. One that is not whole windows is its documents' last."""
    T, W = x_BT.shape[1], self.config.window
    past, filled_B, states_BCSD = self._before(memory)
    x_BNWD = self._inputs(x_BT, memory.previous_B)
    x_BNWD, kept, states_BCSD = self._layers(x_BNWD, past, filled_B, states_BCSD, dropout_key)
    h_BTD = self.norm(x_BNWD).reshape(len(x_BT), -1, x_BNWD.shape[-1])[:, :T]
    k_BLWHK, v_BLWHK = (a.swapaxes(0, 1) for a in kept)
    after = Memory(x_BT[:, -1].astype(jnp.int32), filled_after(filled_B, T, W), k_BLWHK, v_BLWHK, states_BCSD)
    return h_BTD, after, jnp.float32(0)

  def output_logits(self, h: jax.Array) -> jax.Array:
    """Returns the products of outputs with the tokens' table."""
    return self.embedder.logits(h)

  def _inputs(self, x_BT: jax.Array, previous_B: jax.Array) -> jax.Array:
    """The embeddings before each token, in whole windows, [B, N, W, D]."""
    W = self.config.window
    x_BTD = lay_out(self.embedder.inputs(x_BT, previous_B), P(BATCH, None, None))
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, -x_BT.shape[1] % W), (0, 0)))
    return x_BTD.reshape(len(x_BT), -1, W, x_BTD.shape[-1])

  def _before(self, memory: Memory) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Returns what a segment's first window sees: keys and values [L, B, W, H, K], how many are there, and states."""
    past = memory.k_BLWHK.swapaxes(0, 1), memory.v_BLWHK.swapaxes(0, 1)
    begins_B = memory.previous_B < 0
    first_CSD = self.cells.first[...].astype(jnp.float32)
    states_BCSD = jnp.where(begins_B[:, None, None, None], first_CSD, memory.states_BCSD)
    return past, memory.filled_B, states_BCSD

  def _cell(self, number: int) -> Cell:
    """One of the cells."""
    graph, stacked = nnx.split(self.cells)
    return nnx.merge(graph, jax.tree.map(lambda a: a[number], stacked))

  def _layers(self, x_BNWD, past_LBWHK, filled_B, states_BCSD, dropout_key, keep=_of_last_window, window=-1):
    """Runs the layers over whole windows.

    Args:
      past_LBWHK: keys and values of the window before, of which the last `filled_B` tokens are there.
      states_BCSD: as the first window reads them.
      keep: what is kept of a layer's keys and values, [B, N, W, H, K] each.
      window: number of the window that reads the states which are returned; those after the last window are -1.

    Returns:
      The residual stream; what is kept, of all layers; and the states [B, C, S, D].
    """
    config, W = self.config, self.config.window
    key_2W = np.arange(2 * W)
    distance_WW = W + np.arange(W)[:, None] - key_2W  # to the keys of the window before and then of its own
    in_reach = (distance_WW >= 0) & (distance_WW < W)
    later_N = np.arange(x_BNWD.shape[1]) > 0
    there_BN2W = later_N[:, None] | (key_2W >= W - filled_B[:, None, None])
    seen = there_BN2W[:, :, None], in_reach
    (graph, stacked), (cell_graph, stacked_cells) = nnx.split(self.blocks), nnx.split(self.cells)
    keys_L3 = None if dropout_key is None else jax.random.split(dropout_key, (config.num_layers, 3))
    of_layers, of_cells = (stacked, past_LBWHK, keys_L3), (stacked_cells, states_BCSD)

    def layer(x_BNWD, inputs, of_cell=None, states_BSD=None):
      parameters, past, keys = inputs
      block, cell = nnx.merge(graph, parameters), None if of_cell is None else nnx.merge(cell_graph, of_cell)
      x_BNWD, own, states_NBSD = self._layer(block, x_BNWD, past, keys, *seen, cell, states_BSD)
      return x_BNWD, keep(own) if cell is None else (keep(own), states_NBSD)

    kept, states = [], []
    for group in config.groups:
      x_BNWD, of_group, states_CBSD = self._group(layer, group, x_BNWD, of_layers, of_cells, window)
      kept.append(of_group)
      states.append(states_CBSD)
    rest = jax.tree.map(lambda a: a[config.cells[-1] + 1 :], of_layers)
    x_BNWD, of_rest = self._run(layer, x_BNWD, rest, config.num_layers - config.cells[-1] - 1)
    kept_L = tuple(jnp.concatenate(parts) for parts in zip(*kept, of_rest, strict=True))
    return x_BNWD, kept_L, jnp.concatenate(states).swapaxes(0, 1)

  def _layer(self, block, x_BNWD, past, keys, there_BN12W, in_reach, cell, states_BSD):
    """Runs one layer, `block`, over whole windows.

    Args:
      past: keys and values of the window before, [B, W, H, K] each.
      keys: three of dropout, or None.
      there_BN12W, in_reach: which keys of two windows are there, and which a token may attend to, [W, 2 W].
      cell: of a recurrent layer, or None; `states_BSD` are as its first window reads them.

    Returns:
      The residual stream; the layer's own keys and values, [B, N, W, H, K] each; and the states of its cell, or None.
    """
    keys = (None,) * 3 if keys is None else tuple(keys)
    normed = block.attention_norm(x_BNWD)
    q, *own = block.project(normed)
    k, v = both = tuple(_with_previous(a, b) for a, b in zip(own, past, strict=True))  # B N 2W H K
    bias = in_windows(bias_by_distance(block.relative[...], self.config.window))
    attended = attend(
      q,
      k,
      v,
      block.scale[...],
      bias_HMS=bias,
      visible=there_BN12W & in_reach,
      rate=self.config.attention_dropout,
      dropout_key=keys[0],
    )
    from_states, states_NBSD = 0.0, None
    if cell is not None:
      states_NBSD, read = self._through_windows(cell, states_BSD, both, there_BN12W)
      from_states = cell.read(normed, *read)
    return block.finish(x_BNWD, attended, from_states, keys[1:]), own, states_NBSD

  def _run(self, layer, x_BNWD, of_layers, count):
    """Runs `count` layers without cells; returns the residual stream and what is kept of them."""
    scans = scans_layers(self.config)
    one = rematerialised(layer, self.config.remat, is_in_loop=scans and count > 1)
    return jax.lax.scan(one, x_BNWD, of_layers, unroll=1 if scans else max(count, 1))

  def _group(self, layer, group, x_BNWD, of_layers, of_cells, window):
    """Runs one of the config's groups of layers, each time a run without cells and then a layer with one.

    Args:
      of_layers: what `layer` takes of each of all layers.
      of_cells: the parameters of all cells, and the states [B, C, S, D] that the first window reads.

    Returns:
      The residual stream; what is kept of the layers; and the states of its cells [C, B, S, D] that `window` reads.
    """
    start, before, first, count = group
    (cells, states_BCSD), scans = of_cells, scans_layers(self.config)
    recurrent = rematerialised(layer, self.config.remat, is_in_loop=scans and count > 1)

    def run_and_cell(x_BNWD, inputs):
      run, one, of_cell, states_BSD = inputs
      x_BNWD, of_run = self._run(layer, x_BNWD, run, before)
      x_BNWD, (of_one, states_NBSD) = recurrent(x_BNWD, one, of_cell, states_BSD)
      joined = jax.tree.map(lambda many, last: jnp.concatenate([many, last[None]]), of_run, of_one)
      return x_BNWD, (joined, jax.lax.dynamic_index_in_dim(states_NBSD, window, 0, keepdims=False))

    def grouped(a):
      return a[start : start + count * (before + 1)].reshape(count, before + 1, *a.shape[1:])

    both = jax.tree.map(grouped, of_layers)
    run, one = jax.tree.map(lambda a: a[:, :-1], both), jax.tree.map(lambda a: a[:, -1], both)
    cells = jax.tree.map(lambda a: a[first : first + count], cells)
    inputs = run, one, cells, states_BCSD[:, first : first + count].swapaxes(0, 1)
    x_BNWD, (kept, states_CBSD) = jax.lax.scan(run_and_cell, x_BNWD, inputs, unroll=1 if scans else count)
    return x_BNWD, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept), states_CBSD

  def _through_windows(self, cell, states_BSD, both_BN2WHK, there_BN12W):
    """The states before each window and after the last, [N + 1, B, S, D]; and the keys and values that each reads."""
    graph, parameters = nnx.split(cell)

    def window(parameters, states_BSD, k_BTHK, v_BTHK, there_B1T):
      cell: Cell = nnx.merge(graph, parameters)
      projected = cell.project(states_BSD)
      after = cell.next_states(states_BSD, projected, k_BTHK[:, None], v_BTHK[:, None], there_B1T[:, None])
      return after, (states_BSD, projected.k[:, 0], projected.v[:, 0])

    window = rematerialised(window, "full" if self.config.remat == "full" else "none", is_in_loop=True)
    windows = jax.tree.map(lambda a: a.swapaxes(0, 1), (*both_BN2WHK, there_BN12W))
    last_BSD, (before_NBSD, *read) = jax.lax.scan(
      lambda states, one: window(parameters, states, *one), states_BSD, windows
    )
    states_NBSD = jnp.concatenate([before_NBSD, last_BSD[None]])
    return states_NBSD, tuple(a.swapaxes(0, 1) for a in read)

  # --- Decoding: see Recurrent. ---

  def cache_after(self, memory: Memory, x_BT: jax.Array, position: jax.Array) -> Cache:
    """Returns the keys and values of the window at hand and of the one before, and the states that it reads."""
    W = self.config.window
    past, filled_B, states_BCSD = self._before(memory)
    x_BNWD = self._inputs(x_BT, memory.previous_B)
    number = position % self.config.context // W  # of the window in its segment
    all_of_it = {"keep": tuple, "window": number}
    _, kept, states_BCSD = self._layers(x_BNWD, past, filled_B, states_BCSD, None, **all_of_it)
    rings = []
    for own_LBNWHK, past_LBWHK in zip(kept, past, strict=True):
      L, B, N, _, H, K = own_LBNWHK.shape
      all_LBTHK = jnp.concatenate([past_LBWHK, own_LBNWHK.reshape(L, B, N * W, H, K)], axis=2)
      last_LBRHK = jax.lax.dynamic_slice_in_dim(all_LBTHK, number * W, 2 * W, axis=2)
      first = position // W * W - W  # token of its first slot
      rings.append(jnp.roll(last_LBRHK, first % (2 * W), axis=2)[:, :, None])
    k_BCSHK, v_BCSHK = self._state_keys(states_BCSD)
    return Cache(rings[0], rings[1], states_BCSD, k_BCSHK, v_BCSHK)

  def _state_keys(self, states_BCSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of states, [B, C, S, H, K]."""
    projected = [self._cell(c).project(states_BCSD[:, c]) for c in range(states_BCSD.shape[1])]
    return jnp.concatenate([p.k for p in projected], axis=1), jnp.concatenate([p.v for p in projected], axis=1)

  def decode_token(self, cache: Cache, previous_B: jax.Array, position: jax.Array) -> tuple[Cache, jax.Array]:
    """Returns the cache after a token's slot, and its logits [B, V].

    Nothing happens where a segment ends: windows and states go on. The states change where a window ends.
    """
    W = self.config.window
    slot = position % (2 * W)
    distance_R = (slot - jnp.arange(2 * W)) % (2 * W)
    there_R = distance_R <= position
    visible_1R = (there_R & (distance_R < W))[None]
    put = jax.lax.dynamic_update_slice_in_dim
    graph, stacked = nnx.split(self.blocks)

    def layer(x_B11D, inputs, number=None):
      parameters, *cache_B1RHK = inputs
      block: TokenLayer = nnx.merge(graph, parameters)
      normed = block.attention_norm(x_B11D)
      q, *own = block.project(normed)
      k, v = (put(earlier, a, slot, axis=2) for earlier, a in zip(cache_B1RHK, own, strict=True))
      bias_HR = jnp.take(bias_by_distance(block.relative[...], 2 * W), distance_R, axis=1)
      attended = attend(q, k, v, block.scale[...], bias_HMS=bias_HR[:, None], visible=visible_1R)
      from_states: jax.Array | float = 0.0
      if number is not None:
        of_states = (a[:, number, None] for a in (cache.k_BCSHK, cache.v_BCSHK))
        from_states = self._cell(number).read(normed, *of_states)
      return block.finish(x_B11D, attended, from_states, (None, None)), tuple(own)

    before = (cache.k_LB1RHK, cache.v_LB1RHK)
    x_B11D, new = self.embedder(previous_B)[:, None, None], []
    for start, stop, number in self.config.runs:
      run = jax.tree.map(lambda a, start=start, stop=stop: a[start:stop], (stacked, *before))
      if number is None:  # the scan reads the caches alone: what it wrote to would be copied once for every layer
        x_B11D, own = jax.lax.scan(layer, x_B11D, run)
      else:
        x_B11D, own = layer(x_B11D, jax.tree.map(lambda a: a[0], run), number)
        own = tuple(a[None] for a in own)
      new.append(own)
    parts = zip(before, zip(*new, strict=True), strict=True)
    k_LB1RHK, v_LB1RHK = (put(ring, jnp.concatenate(own), slot, axis=3) for ring, own in parts)
    after = cache._replace(k_LB1RHK=k_LB1RHK, v_LB1RHK=v_LB1RHK)
    states_BCSD, k_BCSHK, v_BCSHK = jax.lax.cond(  # of the states alone, so that no branch copies the rings
      slot % W == W - 1,
      lambda: self._after_window(after, there_R),
      lambda: (after.states_BCSD, after.k_BCSHK, after.v_BCSHK),
    )
    after = after._replace(states_BCSD=states_BCSD, k_BCSHK=k_BCSHK, v_BCSHK=v_BCSHK)
    return after, self.embedder.logits(self.norm(x_B11D))[:, 0, 0]

  def _after_window(self, cache: Cache, there_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The states after a window whose last token is in the cache, and their keys and values."""
    states = []
    for c, layer in enumerate(self.config.cells):
      states_BSD, cell = cache.states_BCSD[:, c], self._cell(c)
      k, v = cache.k_LB1RHK[layer], cache.v_LB1RHK[layer]
      states.append(cell.next_states(states_BSD, cell.project(states_BSD), k, v, there_R[None]))
    states_BCSD = jnp.stack(states, axis=1)
    return states_BCSD, *self._state_keys(states_BCSD)
