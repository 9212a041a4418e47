"""Defines the Block-Recurrent Transformer's layers (arXiv 2203.07852): over windows of tokens, and the recurrent cell.

A recurrent layer is a layer over tokens and a cell beside it. In the paper's words, the vertical direction lets tokens
attend to themselves and to the states, the horizontal one lets states attend to themselves and to the tokens. Both
share the tokens' keys and values, and both share the states'; each of the four has queries of its own.

Shapes: B batch, N windows, W tokens of a window, S states, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from megabyte_jax.config.block_recurrent import BUCKETS, BlockRecurrentConfig
from megabyte_jax.models.layers.block import activate, make_ff_in, products_apart
from megabyte_jax.models.layers.dropout import dropout
from megabyte_jax.models.layers.unit_attention import attend, unit
from megabyte_jax.models.parameters import Sizes, make_linear, make_norm, make_parameter, make_scale


def _heads(config: BlockRecurrentConfig) -> dict[str, int]:
  return dict(zip(("heads", "head_dim"), config.level.heads, strict=True))


class Projected(NamedTuple):
  """Holds queries, keys and values of tokens, [B, N, M, H, K], queries and keys of unit length."""

  q: jax.Array
  k: jax.Array
  v: jax.Array


class TokenLayer(nnx.Module):
  """A pre-norm layer over tokens, in parts, so that a cell and a cache can stand between them."""

  def __init__(self, config: BlockRecurrentConfig, rngs: nnx.Rngs):
    self.config, level = config, config.level
    width, heads, hidden = {"width": level.width}, _heads(config), {"hidden": config.hidden(level)}
    out_scale = (2 * level.num_layers) ** -0.5
    unbiased = dataclasses.replace(config, bias=False)
    self.attention_norm = make_norm(level.width, config, rngs)
    self.qkv = make_linear(width, {"projections": 3, **heads}, unbiased, rngs)
    self.scale = make_scale({"heads": level.num_heads})
    self.relative = make_parameter("positions", {"buckets": BUCKETS, "heads": level.num_heads}, config, rngs)
    self.attention_out = make_linear(heads, width, config, rngs, scale=out_scale)
    self.ff_norm = make_norm(level.width, config, rngs)
    self.ff_in = make_ff_in(level, config, rngs)
    self.ff_out = make_linear(hidden, width, config, rngs, scale=out_scale)

  def project(self, normed_BNMD: jax.Array) -> Projected:
    """Returns queries, keys and values of the layer's normed input."""
    q, k, v = products_apart(self.qkv, normed_BNMD)
    return Projected(unit(q), unit(k), v)

  def finish(
    self, x_BNMD: jax.Array, attended_BNMHK: jax.Array, from_states: jax.Array | float, keys: tuple[Any, Any]
  ) -> jax.Array:
    """Adds what attention gives, and then the feed-forward layer.

    Args:
      from_states: [B, N, M, D], what the tokens read from states.
      keys: dropout's, for both additions.
    """
    rate = self.config.dropout
    attended_BNMD = dropout(self.attention_out(attended_BNMHK) + from_states, rate, keys[0])
    x_BNMD = checkpoint_name(x_BNMD + attended_BNMD, "mixed")
    hidden = activate(self.ff_in(self.ff_norm(x_BNMD)), self.config)
    return x_BNMD + dropout(self.ff_out(hidden), rate, keys[1])


class Gate(nnx.Module):
  """Replaces the residual connection of states: the paper's fixed gate, or its LSTM gate.

  For states c and the gate's input h:

    fixed   z = W h + b,         g = sigma(b_g),                               next states c g + z (1 - g)
    lstm    z = tanh(W_z h + b_z), i = sigma(W_i h + b_i - 1), f = sigma(W_f h + b_f + 1),     c f + z i

  As in the authors' code, b_g, b_i and b_f are drawn from N(0, 0.1) and are there without `bias`, too; W_i and W_f are
  drawn with a tenth of the variance of W.
  """

  def __init__(self, inputs: Sizes, config: BlockRecurrentConfig, rngs: nnx.Rngs):
    self.kind = config.gate
    self.linear = make_linear(inputs, {"width": config.width}, config, rngs)  # W or W_z
    if self.kind == "fixed":
      self.b_g = make_parameter("bias", {"channels": config.width}, config, rngs, deviation=0.1)
      return
    unbiased, parts = dataclasses.replace(config, bias=False), {"projections": 2}
    self.gates = make_linear(inputs, parts | {"width": config.width}, unbiased, rngs, scale=0.1**0.5)  # W_i and W_f
    self.b_if = make_parameter("bias", parts | {"channels": config.width}, config, rngs, deviation=0.1)

  def __call__(self, h: jax.Array, c_BSD: jax.Array) -> jax.Array:
    """Returns the next states, float32, of states c and the gate's input h, [B, S] and the axes of `inputs`."""
    y = self.linear(h).astype(jnp.float32)
    if self.kind == "fixed":
      g_D = jax.nn.sigmoid(self.b_g[...].astype(jnp.float32))
      return c_BSD * g_D + y * (1 - g_D)
    gates = self.gates(h).astype(jnp.float32) + self.b_if[...].astype(jnp.float32)
    i, f = gates[:, :, 0], gates[:, :, 1]
    return c_BSD * jax.nn.sigmoid(f + 1) + jnp.tanh(y) * jax.nn.sigmoid(i - 1)


class StateProjections(NamedTuple):
  """Holds keys and values of states, and their queries for states and for tokens, each [B, 1, S, H, K]."""

  k: jax.Array
  v: jax.Array
  q: jax.Array
  q_tokens: jax.Array


class Cell(nnx.Module):
  """The states of one recurrent layer: how they change after a window, and how tokens read them."""

  def __init__(self, config: BlockRecurrentConfig, rngs: nnx.Rngs):
    self.config, level = config, config.level
    width, heads, count = {"width": level.width}, _heads(config), {"heads": level.num_heads}
    unbiased, states = dataclasses.replace(config, bias=False), {"states": config.states, **width}
    self.query = make_linear(width, heads, unbiased, rngs)
    self.query_scale = make_scale(count)
    self.attention_out = make_linear(heads, width, unbiased, rngs, scale=(2 * level.num_layers) ** -0.5)
    self.first = make_parameter("pad", states, config, rngs, deviation=0.1)
    self.norm = make_norm(level.width, config, rngs)
    self.positions = make_parameter("positions", states, config, rngs, deviation=1.0)
    self.projections = make_linear(width, {"projections": 4, **heads}, unbiased, rngs)
    self.self_scale, self.cross_scale = make_scale(count), make_scale(count)
    self.gate = Gate({"sources": 2, **heads}, config, rngs)
    if not config.skip:
      self.ff_norm = make_norm(level.width, config, rngs)
      self.ff_in = make_ff_in(level, config, rngs)
      self.ff_gate = Gate({"hidden": config.hidden(level)}, config, rngs)

  def project(self, c_BSD: jax.Array) -> StateProjections:
    """Returns keys, values and queries of states; each state has a position, without which all would be alike."""
    normed = self.norm(c_BSD)
    normed += self.positions.astype(normed.dtype)
    k, v, q, q_tokens = products_apart(self.projections, normed[:, None])
    return StateProjections(unit(k), v, unit(q), unit(q_tokens))

  def read(self, normed_BNMD: jax.Array, k_BNSHK: jax.Array, v_BNSHK: jax.Array) -> jax.Array:
    """Returns what tokens read from states, [B, N, M, D]: the second half of the vertical direction."""
    q_BNMHK = unit(self.query(normed_BNMD))
    return self.attention_out(attend(q_BNMHK, k_BNSHK, v_BNSHK, self.query_scale[...]))

  def next_states(
    self, c_BSD: jax.Array, projected: StateProjections, k_B1THK: jax.Array, v_B1THK: jax.Array, visible: jax.Array
  ) -> jax.Array:
    """Returns the states after a window: the horizontal direction.

    Args:
      c_BSD: float32, the states before.
      projected: `project(c_BSD)`.
      k_B1THK, v_B1THK: of the window's tokens and of those of the one before, in any order.
      visible: bool, broadcastable to [B, 1, S, T]: which of them are there.
    """
    to_states = attend(projected.q, projected.k, projected.v, self.self_scale[...])
    to_tokens = attend(projected.q_tokens, k_B1THK, v_B1THK, self.cross_scale[...], visible=visible)
    h_BS2HK = jnp.stack([to_states[:, 0], to_tokens[:, 0]], axis=2)
    c_BSD = self.gate(h_BS2HK, c_BSD)
    if not self.config.skip:
      c_BSD = self.ff_gate(activate(self.ff_in(self.ff_norm(c_BSD)), self.config), c_BSD)
    return c_BSD
