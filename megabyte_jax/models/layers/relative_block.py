"""Attends with relative positions, as Transformer-XL does (arXiv 1901.02860, on relative positional encodings).

Shapes: B batch, T slots of a segment, E earlier slots, S = E + T, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from megabyte_jax.config import BlockOptions, Level
from megabyte_jax.models.layers.block import activate, make_ff_in
from megabyte_jax.models.layers.dropout import dropout
from megabyte_jax.models.parameters import make_head_norm, make_linear, make_norm, make_parameter


class Offsets(NamedTuple):
  """The vectors u and v that are added to every query, before its products with keys and with distances."""

  u_HK: jax.Array
  v_HK: jax.Array


class SlotsOfBlock(NamedTuple):
  """Holds what a block makes of slots.

  Attributes:
    k_BSHK, v_BSHK: keys and values.
    use_BTS: float32, the attention that each query pays to each slot: the probabilities' mean over heads.
  """

  k_BSHK: jax.Array
  v_BSHK: jax.Array
  use_BTS: jax.Array


def make_offsets(level: Level, options: BlockOptions, rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param]:
  """Makes u and v, [H, K] each."""
  sizes = dict(zip(("heads", "head_dim"), level.heads, strict=True))
  return make_parameter("offset", sizes, options, rngs), make_parameter("offset", sizes, options, rngs)


def sinusoids(distances_S: jax.Array, width: int) -> jax.Array:
  """Returns R, float32 [S, D]: sines, then cosines, of the distances over wavelengths from 2 pi to 20,000 pi."""
  frequency = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  angle = distances_S.astype(jnp.float32)[:, None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def by_key(by_distance_BHTS: jax.Array) -> jax.Array:
  """Moves what belongs to distances to the keys at these distances.

  Args:
    by_distance_BHTS: column c of each query belongs to the distance S - 1 - c.

  Returns:
    [B, H, T, S], whose column j belongs to key j: at a distance of S - T + i - j from query i. Keys after the query
    get values of no meaning.
  """
  B, H, T, S = by_distance_BHTS.shape
  padded = jnp.pad(by_distance_BHTS, ((0, 0), (0, 0), (0, 0), (1, 0)))
  return padded.reshape(B, H, T * (S + 1))[:, :, T:].reshape(B, H, T, S)


class RelativeBlock(nnx.Module):
  """Attention over earlier slots and the segment, then feed-forward, each added to its input.

  Attributes:
    pre_norm: whether norms stand before attention and feed-forward; else after each sum, as in the paper.
  """

  def __init__(self, level: Level, options: BlockOptions, rngs: nnx.Rngs, *, pre_norm: bool, untie: bool):
    self.level, self.options, self.pre_norm = level, options, pre_norm
    unbiased = dataclasses.replace(options, bias=False)  # the paper's products have none
    width, heads = {"width": level.width}, dict(zip(("heads", "head_dim"), level.heads, strict=True))
    out_scale = (2 * level.num_layers) ** -0.5 if pre_norm else 1.0
    self.attention_norm = make_norm(level.width, options, rngs)
    self.query = make_linear(width, heads, unbiased, rngs)
    self.key_value = make_linear(width, {"projections": 2, **heads}, unbiased, rngs)
    self.distance = make_linear(width, heads, unbiased, rngs)  # W_k,R
    self.attention_out = make_linear(heads, width, unbiased, rngs, scale=out_scale)
    self.ff_norm = make_norm(level.width, options, rngs)
    self.ff_in = make_ff_in(level, options, rngs)
    self.ff_out = make_linear({"hidden": options.hidden(level)}, width, options, rngs, scale=out_scale)
    if options.qk_norm:
      self.q_norm, self.k_norm = make_head_norm(level, options, rngs), make_head_norm(level, options, rngs)
    if untie:
      self.u, self.v = make_offsets(level, options, rngs)

  def queries(self, x_BTD: jax.Array) -> jax.Array:
    """Returns the queries of slots, [B, T, H, K], from the residual stream."""
    q = checkpoint_name(self.query(self.attention_norm(x_BTD) if self.pre_norm else x_BTD), "qkv")
    return self.q_norm(q) if self.options.qk_norm else q

  def keys_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values of slots, [B, S, H, K] each, from the residual stream."""
    kv = checkpoint_name(self.key_value(self.attention_norm(x_BSD) if self.pre_norm else x_BSD), "qkv")
    k, v = kv[:, :, 0], kv[:, :, 1]
    return (self.k_norm(k) if self.options.qk_norm else k), v

  def __call__(
    self,
    x_BTD: jax.Array,
    earlier_BED: jax.Array,
    *,
    visible_BTS: jax.Array,
    R_SD: jax.Array,
    offsets: Offsets | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, SlotsOfBlock]:
    """Takes a segment through the block.

    Args:
      x_BTD: the residual stream.
      earlier_BED: what it was at earlier slots, the input of this same layer.
      visible_BTS: bool, which of the earlier and the segment's slots each slot sees; no later ones.
      R_SD: `sinusoids` of the distances S - 1, S - 2 .. 0.
      offsets: u and v where all layers share them.
      dropout_key: turns dropout on.

    Returns:
      The residual stream after it; and the keys, values and use of all slots.
    """
    q, own = self.queries(x_BTD), self.keys_values(x_BTD)
    # The two apart, so that no gradient of a memory is made that nobody takes.
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(self.keys_values(earlier_BED), own, strict=True))
    u_HK, v_HK = self._offsets(offsets, q.dtype)
    r_SHK = self.distance(R_SD)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("BTHK,BSHK->BHTS", q + u_HK, k)
    logits += by_key(product("BTHK,SHK->BHTS", q + v_HK, r_SHK))
    keys = (None,) * 4 if dropout_key is None else jax.random.split(dropout_key, 4)
    attended_BTHK, use_BTS = self._attend(logits, v, visible_BTS, keys[0])
    return self._finish(x_BTD, attended_BTHK, keys[1:]), SlotsOfBlock(k, v, use_BTS)

  def step(
    self,
    x_B1D: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    *,
    visible_S: jax.Array,
    R_SD: jax.Array,
    offsets: Offsets | None = None,
  ) -> tuple[jax.Array, SlotsOfBlock]:
    """Takes one slot through the block, given the keys and values of earlier ones.

    Args:
      visible_S: bool, which of them it sees.
      R_SD: `sinusoids` of their distances, in their order, and then of 0: one row more than there are slots.

    Returns:
      The residual stream after it; and the slot's own key and value, [B, 1, H, K] each, with the use of the earlier
      slots and of its own, [B, 1, S + 1].
    """
    q, own = self.queries(x_B1D), self.keys_values(x_B1D)
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip((k_BSHK, v_BSHK), own, strict=True))
    u_HK, v_HK = self._offsets(offsets, q.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("BTHK,BSHK->BHTS", q + u_HK, k)
    # W_R goes to the query, of which there is one: there are many distances.
    kernel_DHK = self.distance.kernel.astype(q.dtype)
    turned_BTHD = jnp.einsum("BTHK,DHK->BTHD", q + v_HK, kernel_DHK)
    logits += product("BTHD,SD->BHTS", turned_BTHD, R_SD.astype(q.dtype))
    visible = jnp.concatenate([visible_S, jnp.ones(1, bool)])
    attended_B1HK, use_BTS = self._attend(logits, v, visible[None, None], None)
    return self._finish(x_B1D, attended_B1HK, (None,) * 3), SlotsOfBlock(*own, use_BTS)

  def _offsets(self, shared: Offsets | None, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    u, v = (self.u[...], self.v[...]) if shared is None else shared
    return u.astype(dtype), v.astype(dtype)

  def _attend(
    self, logits_BHTS: jax.Array, v_BSHK: jax.Array, visible_BTS: jax.Array, key: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of values [B, T, H, K] by the masked float32 softmax of logits not scaled yet; and `use_BTS`."""
    logits = logits_BHTS * self.level.heads[1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible_BTS[:, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
    use_BTS = jnp.mean(weights, axis=1)  # costs nothing where nobody asks for it
    weights = dropout(weights, self.options.attention_dropout, key).astype(v_BSHK.dtype)
    return checkpoint_name(jnp.einsum("BHTS,BSHK->BTHK", weights, v_BSHK), "attended"), use_BTS

  def _finish(
    self, x_BTD: jax.Array, attended_BTHK: jax.Array, keys: Sequence[jax.Array | None] | jax.Array
  ) -> jax.Array:
    """The block after attention."""
    rate = self.options.dropout
    x_BTD = checkpoint_name(x_BTD + dropout(self.attention_out(attended_BTHK), rate, keys[0]), "mixed")
    if not self.pre_norm:
      x_BTD = self.attention_norm(x_BTD)
    hidden = activate(self.ff_in(self.ff_norm(x_BTD) if self.pre_norm else x_BTD), self.options)
    x_BTD += dropout(self.ff_out(dropout(hidden, rate, keys[1])), rate, keys[2])
    return x_BTD if self.pre_norm else self.ff_norm(x_BTD)
