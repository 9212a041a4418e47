"""Defines the decoder block that every model is made of.

Shapes: B batch, N spans, M slots of a span, D width, H heads, K head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from megabyte_jax.config import BlockOptions, Level
from megabyte_jax.models.kernels import cached_attention, qk_norm_rotary, rms_norm_swiglu
from megabyte_jax.models.layers import attention as attention_lib
from megabyte_jax.models.layers.attention import Past
from megabyte_jax.models.layers.dropout import dropout
from megabyte_jax.models.layers.quantised import Linear, Quantised, beside
from megabyte_jax.models.parameters import make_head_norm, make_linear, make_norm
from megabyte_jax.parallel.activation_layout import BATCH, mesh_axes, row_major, spec_of
from megabyte_jax.parallel.backend import platform

KeyValue = tuple[jax.Array, jax.Array]  # k_BNMHK, v_BNMHK


def normalised(norm: nnx.LayerNorm | nnx.RMSNorm, x: jax.Array) -> jax.Array:
  """Computes norm(x) of a few rows on a GPU: the variance from the deviations, which XLA makes one kernel."""
  if isinstance(norm, nnx.RMSNorm):
    return norm(x)
  deviation = x.astype(jnp.float32)
  deviation -= jnp.mean(deviation, axis=-1, keepdims=True)
  variance = jnp.mean(deviation * deviation, axis=-1, keepdims=True)
  scale, bias = norm.scale, norm.bias
  assert scale is not None  # make_norm gives every norm one
  y = deviation * (jax.lax.rsqrt(variance + norm.epsilon) * scale[...])
  return (y if bias is None else y + bias[...]).astype(norm.dtype)


def takes_kernels(options: BlockOptions) -> bool:
  """Returns whether rms_norm_swiglu.py and qk_norm_rotary.py may serve where they can: not with `attention="xla"`."""
  return options.attention != "xla"


def kept_and_normed(
  norm: nnx.LayerNorm | nnx.RMSNorm, x_BNMD: jax.Array, options: BlockOptions
) -> tuple[jax.Array, jax.Array]:
  """Returns x and norm(x). Use the returned x wherever else x is read, as with `rms_norm_swiglu.rms_norm`."""
  if isinstance(norm, nnx.RMSNorm) and takes_kernels(options) and not rms_norm_swiglu.norm_obstacle(x_BNMD):
    return rms_norm_swiglu.rms_norm(x_BNMD, norm)
  return x_BNMD, norm(x_BNMD)


def make_ff_in(level: Level, options: BlockOptions, rngs: nnx.Rngs) -> Linear:
  """Makes the feed-forward layer's first product: D to F, or to 2, F if it is gated."""
  halves = {"halves": 2} if options.gated else {}
  return make_linear({"width": level.width}, halves | {"hidden": options.hidden(level)}, options, rngs)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """Computes max(x, 0), whose derivative is taken from the result, so that backward need not keep x."""
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
  y = checkpoint_name(relu(*primals), "hidden")
  return y, jnp.where(y > 0, tangents[0], 0)


def activate(hidden: jax.Array, options: BlockOptions) -> jax.Array:
  """Applies the feed-forward activation: [.., F] to [.., F], or if gated (SwiGLU; Shazeer, 2020) from [.., 2, F]."""
  hidden = row_major(hidden, _hidden_spec(hidden, options))
  if options.activation == "relu":
    return relu(hidden)
  hidden = checkpoint_name(hidden, "hidden")
  if options.gated:
    if takes_kernels(options) and not rms_norm_swiglu.swiglu_obstacle(hidden):
      return rms_norm_swiglu.swiglu(hidden)
    gate, up = parts_of(hidden, axis=hidden.ndim - 2)
    return jax.nn.silu(gate) * up
  return getattr(jax.nn, options.activation)(hidden)


def _hidden_spec(hidden: jax.Array, options: BlockOptions) -> P | None:
  """Returns how the hidden layer lies on a mesh; None for a single slot: while decoding XLA may spread it otherwise."""
  last = (None, "tensor") if options.gated else ("tensor",)
  *rows, slots = hidden.shape[: -len(last)]
  if slots == 1 or not rows:
    return None
  return spec_of(hidden, *last) if len(rows) == 2 else P(BATCH, None, *last)


def parts_of(x: jax.Array, axis: int) -> tuple[jax.Array, ...]:
  """Returns x's parts along an axis, which their gradients are joined along; those of slices are padded and added."""
  parts = jnp.split(x, x.shape[axis], axis=axis)
  return tuple(jnp.squeeze(part, axis=axis) for part in parts)


def angles(slots_M: jax.Array, head_width: int) -> jax.Array:
  """Returns by how much each of a head's K / 2 pairs is turned at each slot, [M, K / 2], float32."""
  half = head_width // 2
  return slots_M.astype(jnp.float32)[:, None] * 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)


def rotate(x_BNMHK: jax.Array, slots_M: jax.Array) -> jax.Array:
  """Applies rotary positions (Su et al., 2021): turns the pair (x_i, x_{i+K/2}) by slot * 10000^(-2i/K).

  Rotations add up: rotating the keys of slots j by -m makes them the keys of slots j - m.
  """
  angle_M1F = angles(slots_M, x_BNMHK.shape[-1])[:, None]
  a, b = jnp.split(x_BNMHK.astype(jnp.float32), 2, axis=-1)
  sin, cos = jnp.sin(angle_M1F), jnp.cos(angle_M1F)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNMHK.dtype)


def _products(x_BNMD: jax.Array, kernel_DCF: jax.Array) -> list[jax.Array]:
  """Computes C products of x.

  Where heads are spread over devices, every product gives each device a part of the gradient with respect to x. These
  parts are added up before devices sum them: one all-reduce instead of C, whatever XLA makes of C sums. On a CPU this
  is for tests in float32 alone: XLA for CPUs (JAX 0.10.2) ends the process over such a sum of bfloat16.
  """

  def each(x_BNMD, kernel_DCF):
    return [x_BNMD @ kernel_DCF[:, i] for i in range(kernel_DCF.shape[1])]

  devices = mesh_axes().get("tensor", 1)
  if devices == 1 or kernel_DCF.shape[2] % devices:
    return each(x_BNMD, kernel_DCF)
  heads = P(*(None,) * (x_BNMD.ndim - 1), "tensor")
  return jax.shard_map(
    lambda x_BNMD, kernel_DCF: each(jax.lax.pcast(x_BNMD, "tensor", to="varying"), kernel_DCF),
    in_specs=(P(), P(None, None, "tensor")),
    out_specs=heads,
    axis_names={"tensor"},
  )(x_BNMD, kernel_DCF)


def products_apart(linear: Linear, x_BNMD: jax.Array) -> tuple[jax.Array, ...]:
  """Computes linear(x), [B, N, M, C, H, K], as C arrays: queries, keys and values, or the latter two.

  On a GPU these are C products: slices of one would be copied for its attention kernels.
  """
  D, C, H, K = linear.kernel.shape
  if platform() != "gpu" or isinstance(linear.kernel.get_value(), Quantised):
    y_BNMCHK = checkpoint_name(linear(x_BNMD), "qkv")
    return parts_of(y_BNMCHK, axis=3)
  kernel_DCF, x_BNMD = (a.astype(linear.dtype) for a in (linear.kernel.reshape(D, C, H * K), x_BNMD))
  products = _products(x_BNMD, kernel_DCF)
  if linear.bias is not None:
    bias_CF = linear.bias.reshape(C, H * K).astype(linear.dtype)
    products = [product + bias_CF[i] for i, product in enumerate(products)]
  return tuple(checkpoint_name(product.reshape(*product.shape[:-1], H, K), "qkv") for product in products)


def product_with_transposed(linear: Linear, x: jax.Array) -> jax.Array:
  """Computes linear(x), whose weights lie with their input axes last: XLA alone would transpose them in memory."""
  kernel, axes = linear.kernel.get_value(), len(linear.in_features)
  weight = kernel.values if isinstance(kernel, Quantised) else kernel
  weight = weight.transpose(*range(axes, weight.ndim), *range(axes))
  weight_FD = row_major(weight.reshape(-1, math.prod(linear.in_features)))
  x_RD = x.reshape(-1, weight_FD.shape[1])
  if isinstance(kernel, Quantised):
    x_RD, weight_FD = beside(x_RD.astype(linear.dtype), weight_FD)
    y_RF = jnp.einsum("RD,FD->RF", x_RD, weight_FD.astype(x_RD.dtype), preferred_element_type=jnp.float32)
    y_RF = (y_RF * kernel.scale.reshape(-1)).astype(x_RD.dtype)
  else:
    y_RF = jnp.einsum("RD,FD->RF", x_RD.astype(weight_FD.dtype), weight_FD)
  y_RF = y_RF if linear.bias is None else y_RF + linear.bias[...].reshape(-1)
  return y_RF.reshape(*x.shape[: x.ndim - axes], *linear.out_features)


class Block(nnx.Module):
  """Pre-norm decoder block: attention, then feed-forward, each added to its input."""

  def __init__(self, level: Level, options: BlockOptions, rngs: nnx.Rngs):
    self.level, self.options = level, options
    width, hidden = {"width": level.width}, {"hidden": options.hidden(level)}
    heads = dict(zip(("heads", "head_dim"), level.heads, strict=True))
    out_scale = (2 * level.num_layers) ** -0.5  # metaseq's scaling of residual outputs
    self.attention_norm = make_norm(level.width, options, rngs)
    self.qkv = make_linear(width, {"projections": 3, **heads}, options, rngs)
    self.attention_out = make_linear(heads, width, options, rngs, scale=out_scale)
    self.ff_norm = make_norm(level.width, options, rngs)
    self.ff_in = make_ff_in(level, options, rngs)
    self.ff_out = make_linear(hidden, width, options, rngs, scale=out_scale)
    if options.qk_norm:
      self.q_norm, self.k_norm = make_head_norm(level, options, rngs), make_head_norm(level, options, rngs)

  def __call__(
    self,
    x_BNMD: jax.Array,
    *,
    slots_M: jax.Array,
    past: Past | cached_attention.Filled | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, KeyValue]:
    """Computes one layer over M consecutive slots of each span.

    Args:
      x_BNMD: the residual stream.
      slots_M: the slots' numbers within their span.
      past: what a cache holds of earlier slots. Without one, the slots start their span, and see the
        end of the previous span if the level has cross-patch attention.
      dropout_key: None in evaluation and generation.

    Returns:
      The new residual stream, and the keys and values of its slots (what a cache keeps).
    """
    level, options = self.level, self.options
    if isinstance(past, cached_attention.Filled):
      return self._one_slot(x_BNMD, slots_M, past)
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    x_BNMD, normed_BNMD = kept_and_normed(self.attention_norm, x_BNMD, options)
    q, k, v = products_apart(self.qkv, normed_BNMD)
    q, k = self._qk_norm_rotary(q, k, slots_M)
    if past is None and level.cross_patch:
      past = past_of_previous_span(k, v, level.cross_patch)
    attended = attention_lib.attention(
      q,
      k,
      v,
      past=past,
      window=level.attention_window,
      implementation=options.attention,
      dropout=options.attention_dropout,
      dropout_key=keys[0],
    )
    attended = checkpoint_name(attended, "attended")
    x_BNMD = checkpoint_name(x_BNMD + dropout(self.attention_out(attended), options.dropout, keys[1]), "mixed")
    x_BNMD, normed_BNMD = kept_and_normed(self.ff_norm, x_BNMD, options)
    hidden = activate(self.ff_in(normed_BNMD), options)
    x_BNMD += dropout(self.ff_out(hidden), options.dropout, keys[2])
    return x_BNMD, (k, v)

  def _qk_norm_rotary(self, q: jax.Array, k: jax.Array, slots_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes QK-norm and rotary positions, where the model has them."""
    norms = (self.q_norm, self.k_norm) if self.options.qk_norm else None
    if self.level.rotary and takes_kernels(self.options) and not qk_norm_rotary.qk_norm_rotary_obstacle(q):
      return qk_norm_rotary.qk_norm_rotary(q, k, angles(slots_M, q.shape[-1]), norms)
    if norms:
      q, k = norms[0](q), norms[1](k)
    if self.level.rotary:
      q, k = rotate(q, slots_M), rotate(k, slots_M)
    return q, k

  def _one_slot(
    self, x_B11D: jax.Array, slots_1: jax.Array, past: cached_attention.Filled
  ) -> tuple[jax.Array, KeyValue]:
    """`__call__` for a single slot on one GPU: attention by a kernel, weights as build.py lays them out for it."""
    qkv_B113HK = product_with_transposed(self.qkv, normalised(self.attention_norm, x_B11D))
    q, k, v = (qkv_B113HK[:, :, :, i] for i in range(3))
    q, k = self._qk_norm_rotary(q, k, slots_1)
    if self.options.qk_norm or self.level.rotary:
      qkv_B113HK = jnp.stack([q, k, v], axis=3)
    attended_B11HK = cached_attention.attend(qkv_B113HK[:, 0, 0], past)[:, None, None]
    x_B11D += product_with_transposed(self.attention_out, attended_B11HK)
    hidden = activate(product_with_transposed(self.ff_in, normalised(self.ff_norm, x_B11D)), self.options)
    return x_B11D + product_with_transposed(self.ff_out, hidden), (k, v)


def past_of_previous_span(k_BNMHK: jax.Array, v_BNMHK: jax.Array, r: int) -> Past:
  """Returns the last r keys and values of the previous span, at slots -r .. -1: cross-patch attention (2.3.2)."""
  M = k_BNMHK.shape[2]
  k_tail = rotate(k_BNMHK[:, :, M - r :], jnp.full((r,), -M))
  has_previous = jnp.arange(k_BNMHK.shape[1])[:, None, None] > 0
  return Past(attention_lib.previous_span(k_tail), attention_lib.previous_span(v_BNMHK[:, :, M - r :]), has_previous)
