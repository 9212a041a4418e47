"""The decoder block that every model is made of, and stacks of it.

Shapes: B batch, N spans, M slots of a span, D width, H heads, K head width, L layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from megabyte_jax.hardware import platform, row_major
from megabyte_jax.models import attention as attention_lib
from megabyte_jax.models import cached_attention, fp8, stack_kernel
from megabyte_jax.models.attention import Past
from megabyte_jax.models.config import BlockOptions, Level
from megabyte_jax.models.dropout import dropout

KeyValue = tuple[jax.Array, jax.Array]  # k_BNMHK, v_BNMHK


def compute_dtype(options: BlockOptions) -> jnp.dtype:
  """The dtype of activations; `auto` is float32 on CPU and bfloat16 elsewhere."""
  if options.compute_dtype == "auto":
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
  return jnp.dtype(options.compute_dtype)


def init_normal(options: BlockOptions, scale: float = 1.0) -> Callable:
  """Normal(0, init_std * scale), cut at two standard deviations (appendix A.1)."""
  return nnx.initializers.truncated_normal(stddev=options.init_std * scale, lower=-2.0, upper=2.0)


def make_norm(width: int, options: BlockOptions, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
  """LayerNorm or RMSNorm; statistics in float32, result in the compute dtype."""
  arguments: dict[str, Any] = dict(num_features=width, epsilon=1e-5, dtype=compute_dtype(options), rngs=rngs)
  if options.norm == "rmsnorm":
    return nnx.RMSNorm(**arguments)
  return nnx.LayerNorm(use_bias=options.bias, **arguments)


def make_linear(
  shape_in: tuple[int, ...], shape_out: tuple[int, ...], options: BlockOptions, rngs: nnx.Rngs, *, scale: float = 1.0
) -> nnx.LinearGeneral:
  """A matrix product over the last axes; `scale` shrinks the initial weights."""
  return nnx.LinearGeneral(
    shape_in,
    shape_out,
    axis=tuple(range(-len(shape_in), 0)),
    use_bias=options.bias,
    kernel_init=init_normal(options, scale),
    dot_general=fp8.dot_general if options.products == "fp8" else None,
    dtype=compute_dtype(options),
    rngs=rngs,
  )


def make_ff_in(level: Level, options: BlockOptions, rngs: nnx.Rngs) -> nnx.LinearGeneral:
  """The feed-forward layer's first product: D to F, or to 2, F if it is gated."""
  hidden = options.hidden(level)
  return make_linear((level.width,), (2, hidden) if options.gated else (hidden,), options, rngs)


def make_head_norm(level: Level, options: BlockOptions, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """RMSNorm over a head's width (`qk_norm`); one scale for all heads."""
  return nnx.RMSNorm(level.heads[1], epsilon=1e-5, dtype=compute_dtype(options), rngs=rngs)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), whose derivative is taken from the result, so that backward need not keep x."""
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
  y = checkpoint_name(relu(*primals), "hidden")
  return y, jnp.where(y > 0, tangents[0], 0)


def activate(hidden: jax.Array, options: BlockOptions) -> jax.Array:
  """The feed-forward layer's activation: [.., F] to [.., F], or if gated (SwiGLU; Shazeer, 2020) from [.., 2, F]."""
  hidden = row_major(hidden)
  if options.activation == "relu":
    return relu(hidden)
  hidden = checkpoint_name(hidden, "hidden")
  if options.gated:
    return jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
  return getattr(jax.nn, options.activation)(hidden)


def rotate(x_BNMHK: jax.Array, slots_M: jax.Array) -> jax.Array:
  """Rotary positions (Su et al., 2021): turns the pair (x_i, x_{i+K/2}) by slot * 10000^(-2i/K).

  Rotations add up: rotating the keys of slots j by -m makes them the keys of slots j - m.
  """
  half = x_BNMHK.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_M1F = slots_M.astype(jnp.float32)[:, None, None] * frequency
  a, b = jnp.split(x_BNMHK.astype(jnp.float32), 2, axis=-1)
  sin, cos = jnp.sin(angle_M1F), jnp.cos(angle_M1F)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNMHK.dtype)


def product_with_transposed(linear: nnx.LinearGeneral, x: jax.Array) -> jax.Array:
  """linear(x), whose weights lie with their input axes last: XLA alone would transpose them in memory."""
  kernel, axes = linear.kernel[...], len(linear.in_features)
  weight = kernel.transpose(*range(axes, kernel.ndim), *range(axes))
  weight_FD = row_major(weight.reshape(-1, math.prod(linear.in_features)))
  y_RF = jnp.einsum("RD,FD->RF", x.reshape(-1, weight_FD.shape[1]).astype(weight_FD.dtype), weight_FD)
  y_RF = y_RF if linear.bias is None else y_RF + linear.bias[...].reshape(-1)
  return y_RF.reshape(*x.shape[: x.ndim - axes], *linear.out_features)


def stack_weights(stack: Stack) -> stack_kernel.Weights:
  """The stacked parameters as stack_kernel.py takes them: no copies where they lie as build.py puts them."""
  blocks, level = stack.blocks, stack.level
  (heads, width), L, D = level.heads, level.num_layers, level.width
  qkv_LD3HK, out_LHKD = blocks.qkv.kernel[...], blocks.attention_out.kernel[...]
  bias = blocks.qkv.bias is not None
  shift = getattr(blocks.attention_norm, "bias", None) is not None
  return stack_kernel.Weights(
    qkv_LD3HK.transpose(0, 2, 3, 4, 1).reshape(L, 3, heads, 2, width // 2, D),
    blocks.qkv.bias[...].reshape(L, 3, heads, 2, width // 2) if bias else None,
    out_LHKD.transpose(0, 3, 1, 2).reshape(L, D, heads * width),
    blocks.attention_out.bias[...] if bias else None,
    blocks.ff_in.kernel[...].reshape(L, D, -1).transpose(0, 2, 1),
    blocks.ff_in.bias[...].reshape(L, -1) if bias else None,
    blocks.ff_out.kernel[...].transpose(0, 2, 1),
    blocks.ff_out.bias[...] if bias else None,
    blocks.attention_norm.scale[...],
    blocks.attention_norm.bias[...] if shift else None,
    blocks.ff_norm.scale[...],
    blocks.ff_norm.bias[...] if shift else None,
  )


class Block(nnx.Module):
  """Pre-norm decoder block: attention, then feed-forward, each added to its input."""

  def __init__(self, level: Level, options: BlockOptions, rngs: nnx.Rngs):
    self.level, self.options = level, options
    heads = level.heads
    out_scale = (2 * level.num_layers) ** -0.5  # metaseq's scaling of residual outputs
    self.attention_norm = make_norm(level.width, options, rngs)
    self.qkv = make_linear((level.width,), (3, *heads), options, rngs)
    self.attention_out = make_linear(heads, (level.width,), options, rngs, scale=out_scale)
    self.ff_norm = make_norm(level.width, options, rngs)
    self.ff_in = make_ff_in(level, options, rngs)
    self.ff_out = make_linear((options.hidden(level),), (level.width,), options, rngs, scale=out_scale)
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
    """One layer over M consecutive slots of each span.

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
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    if isinstance(past, cached_attention.Filled):
      return self._one_slot(x_BNMD, slots_M, past)
    q, k, v = self._qkv(self.attention_norm(x_BNMD))
    if options.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if level.rotary:
      q, k = rotate(q, slots_M), rotate(k, slots_M)
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
    x_BNMD += dropout(self.attention_out(attended), options.dropout, keys[1])
    hidden = activate(self.ff_in(self.ff_norm(x_BNMD)), options)
    x_BNMD += dropout(self.ff_out(hidden), options.dropout, keys[2])
    return x_BNMD, (k, v)

  def _qkv(self, y_BNMD: jax.Array) -> tuple[jax.Array, ...]:
    """Queries, keys and values; on a GPU as three products: slices of one would be copied for its attention kernels."""
    if platform() != "gpu":
      qkv_BNM3HK = checkpoint_name(self.qkv(y_BNMD), "qkv")
      return tuple(qkv_BNM3HK[:, :, :, i] for i in range(3))
    D, _, H, K = self.qkv.kernel.shape
    kernel_D3F, y_BNMD = (a.astype(self.qkv.dtype) for a in (self.qkv.kernel.reshape(D, 3, H * K), y_BNMD))
    product = fp8.product if self.options.products == "fp8" else jnp.matmul
    products = [product(y_BNMD, kernel_D3F[:, i]) for i in range(3)]
    if self.qkv.bias is not None:
      bias_3F = self.qkv.bias.reshape(3, H * K).astype(self.qkv.dtype)
      products = [product + bias_3F[i] for i, product in enumerate(products)]
    return tuple(checkpoint_name(product.reshape(*product.shape[:-1], H, K), "qkv") for product in products)

  def _one_slot(
    self, x_B11D: jax.Array, slots_1: jax.Array, past: cached_attention.Filled
  ) -> tuple[jax.Array, KeyValue]:
    """`__call__` for a single slot on one GPU: attention by a kernel, weights as build.py lays them out for it."""
    qkv_B113HK = product_with_transposed(self.qkv, self.attention_norm(x_B11D))
    q, k, v = (qkv_B113HK[:, :, :, i] for i in range(3))
    if self.options.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if self.level.rotary:
      q, k = rotate(q, slots_1), rotate(k, slots_1)
    if self.options.qk_norm or self.level.rotary:
      qkv_B113HK = jnp.stack([q, k, v], axis=3)
    attended_B11HK = cached_attention.attend(qkv_B113HK[:, 0, 0], past)[:, None, None]
    x_B11D += product_with_transposed(self.attention_out, attended_B11HK)
    hidden = activate(product_with_transposed(self.ff_in, self.ff_norm(x_B11D)), self.options)
    return x_B11D + product_with_transposed(self.ff_out, hidden), (k, v)


def past_of_previous_span(k_BNMHK: jax.Array, v_BNMHK: jax.Array, r: int) -> Past:
  """Cross-patch attention (section 2.3.2): the last r keys and values of the previous span, slots -r .. -1."""
  M = k_BNMHK.shape[2]
  k_tail = rotate(k_BNMHK[:, :, M - r :], jnp.full((r,), -M))
  has_previous = jnp.arange(k_BNMHK.shape[1])[:, None, None] > 0
  return Past(attention_lib.previous_span(k_tail), attention_lib.previous_span(v_BNMHK[:, :, M - r :]), has_previous)


class Cache(NamedTuple):
  """Keys and values of a stack for one span: the last r slots of the previous span, then this span's slots."""

  k_LBNSHK: jax.Array
  v_LBNSHK: jax.Array


class Stack(nnx.Module):
  """The decoder blocks of one level, their parameters stacked along a first axis, and a last norm."""

  def __init__(self, level: Level, options: BlockOptions, rngs: nnx.Rngs):
    self.level, self.options = level, options

    @nnx.split_rngs(splits=level.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_blocks(rngs):
      return Block(level, options, rngs)

    self.blocks = make_blocks(rngs)
    self.norm = make_norm(level.width, options, rngs)

  def __call__(
    self,
    x_BNMD: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
    keep: Callable[[jax.Array, jax.Array], Any] = lambda k, v: None,
  ) -> tuple[jax.Array, Any]:
    """Whole spans (or their first M slots) at once.

    Returns:
      The normed output [B, N, M, D], and `keep(k_BNMHK, v_BNMHK)` of every layer, stacked.
    """
    slots_M = jnp.arange(x_BNMD.shape[2])
    graph, layers = nnx.split(self.blocks)
    layers = stacked(layers)
    keys = None if dropout_key is None else jax.random.split(dropout_key, self.level.num_layers)

    def layer(x_BNMD, layer_and_key):
      parameters, key = layer_and_key
      x_BNMD = row_major(x_BNMD)
      x_BNMD, kv = nnx.merge(graph, parameters)(x_BNMD, slots_M=slots_M, dropout_key=key)
      return x_BNMD, keep(*kv)

    options = self.options
    scans = options.scan_layers == "always" or (options.scan_layers == "auto" and platform() != "gpu")
    layer = _rematerialised(layer, options.remat, is_in_loop=scans)
    unroll = 1 if scans else self.level.num_layers
    x_BNMD, kept = jax.lax.scan(layer, x_BNMD, (layers, keys), unroll=unroll)
    return self.norm(x_BNMD), kept

  def empty_cache(self, batch: int, slots: int) -> Cache:
    """A cache for a span of `slots` slots."""
    heads, width = self.level.heads
    shape = (self.level.num_layers, batch, 1, self.level.cross_patch + slots, heads, width)
    zeros = functools.partial(jnp.zeros, shape, compute_dtype(self.options))
    return Cache(zeros(), zeros())

  def step(
    self, x_B11D: jax.Array, cache: Cache, slot: jax.Array, has_previous: jax.Array | bool
  ) -> tuple[jax.Array, Cache]:
    """One slot, given the cache of the earlier ones; the same block function as in training.

    Args:
      x_B11D: the slot's input.
      cache: as left by the slots before.
      slot: its number within the span.
      has_previous: whether a span lies before this one (used with cross-patch attention only).
    """
    r, window = self.level.cross_patch, self.level.attention_window
    first = jnp.maximum(jnp.where(has_previous, 0, r), r + slot - window + 1 if window else 0)  # entry that is seen
    if self._in_one_kernel(x_B11D.shape[0]):
      x_D, *kv = stack_kernel.step(
        x_B11D[0, 0, 0],
        stack_weights(self),
        *(a[:, 0, 0] for a in cache),
        first=first,
        at=r + slot,
        slot=slot,
        level=self.level,
        options=self.options,
        epsilon=self.norm.epsilon,
      )
      return self.norm(x_D[None, None, None]), Cache(*(a[:, None, None] for a in kv))
    graph, layers = nnx.split(self.blocks)
    if is_unstacked(layers):
      new = []
      seen_2 = jnp.stack([first, r + slot]).astype(jnp.int32)
      for i in range(self.level.num_layers):
        k_LBSHK, v_LBSHK = (a[:, :, 0] for a in cache)
        past = cached_attention.Filled(k_LBSHK, v_LBSHK, jnp.full(1, i, jnp.int32), seen_2)
        x_B11D, kv = nnx.merge(graph, layer_of(layers, i))(x_B11D, slots_M=slot[None], past=past)
        new.append(kv)
      return self.norm(x_B11D), _written(cache, [jnp.stack(a) for a in zip(*new, strict=True)], r + slot)
    cached = jnp.arange(cache.k_LBNSHK.shape[3]) - r  # the slot that each entry of the cache holds
    visible = (cached < slot) & ((cached >= 0) | has_previous)
    if window:
      visible &= slot - cached < window

    def layer(x_B11D, parameters_and_cache):
      parameters, k_BNSHK, v_BNSHK = parameters_and_cache
      return nnx.merge(graph, parameters)(x_B11D, slots_M=slot[None], past=Past(k_BNSHK, v_BNSHK, visible))

    # The scan reads the caches alone: what it wrote to would be copied as a whole, once for every layer.
    x_B11D, new = jax.lax.scan(layer, x_B11D, (layers, *cache))
    return self.norm(x_B11D), _written(cache, new, r + slot)

  def _in_one_kernel(self, rows: int) -> bool:
    """Whether a step is one kernel: `in_compute_dtype` (build.py) has left the layers stacked for it."""
    parameter = self.blocks.qkv.kernel.get_value()
    return (
      not isinstance(parameter, tuple)
      and parameter.dtype == compute_dtype(self.options)
      and cached_attention.on_one_gpu(parameter.dtype)
      and stack_kernel.serves(self.level, self.options, rows)
    )

  def next_span(self, cache: Cache) -> Cache:
    """The cache at the start of the next span: the last r slots move to the front, to slots -r .. -1."""
    r = self.level.cross_patch
    slots = cache.k_LBNSHK.shape[3] - r
    k_tail, v_tail = (a[:, :, :, slots:] for a in cache)
    k_tail = jax.vmap(rotate, in_axes=(0, None))(k_tail, jnp.full((r,), -slots))
    return Cache(cache.k_LBNSHK.at[:, :, :, :r].set(k_tail), cache.v_LBNSHK.at[:, :, :, :r].set(v_tail))


def _written(cache: Cache, new_LB11HK, at: jax.Array) -> Cache:
  """The cache with the keys and values of one slot, of all layers, at its entry `at`."""
  start = (0, 0, 0, at, 0, 0)
  return Cache(*(jax.lax.dynamic_update_slice(a, b, start) for a, b in zip(cache, new_LB11HK, strict=True)))


# The layers' parameters as a tuple of arrays instead of a stacked one: no step has to cut its layer's out of a stack.


def unstacked(parameter: nnx.Variable) -> nnx.Variable:
  """A parameter of stacked blocks in the form of a tuple."""
  return parameter.replace(tuple(parameter[...]))


def is_unstacked(layers: nnx.State) -> bool:
  """Whether parameters of blocks are tuples."""
  return isinstance(_variables(layers)[0].get_value(), tuple)


def layer_of(layers: nnx.State, i: int) -> nnx.State:
  """The parameters of layer i."""
  return _map_variables(lambda a: a.replace(a.get_value()[i]), layers)


def stacked(layers: nnx.State) -> nnx.State:
  """The parameters of blocks with a first axis of layers, whatever their form."""
  if not is_unstacked(layers):
    return layers
  return _map_variables(lambda a: a.replace(jnp.stack(a.get_value())), layers)


def _variables(layers):
  return jax.tree.leaves(layers, is_leaf=is_variable)


def _map_variables(function, layers):
  return jax.tree.map(function, layers, is_leaf=is_variable)


def is_variable(node: Any) -> bool:
  """Whether a node of a model's state is a whole parameter, be it a tuple."""
  return isinstance(node, nnx.Variable)


def _rematerialised(layer: Callable, remat: str, *, is_in_loop: bool) -> Callable:
  """`layer` with its activations recomputed in the backward pass, as `BlockOptions.remat` says."""
  if remat == "none":
    return layer
  kept = ("qkv", "attended", "hidden") if remat == "named" else ()
  policy = jax.checkpoint_policies.save_only_these_names(*kept, "scale")  # of an fp8 product: a number costs nothing
  # Inside a loop nothing can be merged anyway. Outside, XLA may keep what is cheap to keep, unless memory is short.
  return jax.checkpoint(layer, policy=policy, prevent_cse=remat == "full" and not is_in_loop)
