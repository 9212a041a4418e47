"""Stacks decoder blocks, run over whole spans at once or slot by slot with a cache.

Shapes: B batch, N spans, M slots of a span, S slots of a cache, D width, H heads, K head width, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.config import Level, ModelConfig
from megabyte_jax.models.kernels import cached_attention, decoding_step
from megabyte_jax.models.layers.attention import Past
from megabyte_jax.models.layers.block import Block, normalised, rotate
from megabyte_jax.models.layers.quantised import Linear, Quantised
from megabyte_jax.models.parameters import compute_dtype, make_layers, make_norm
from megabyte_jax.parallel.activation_layout import mesh_axes, row_major, spec_of
from megabyte_jax.parallel.backend import platform
from megabyte_jax.parallel.parameter_info import is_variable


class Cache(NamedTuple):
  """Keys and values of a stack for one span: the last r slots of the previous span, then this span's slots."""

  k_LBNSHK: jax.Array
  v_LBNSHK: jax.Array


class Stack(nnx.Module):
  """The decoder blocks of one level, their parameters stacked along a first axis, and a last norm."""

  def __init__(self, level: Level, options: ModelConfig, rngs: nnx.Rngs):
    self.level, self.options = level, options
    self.blocks = make_layers(lambda rngs: Block(level, options, rngs), level.num_layers, rngs)
    self.norm = make_norm(level.width, options, rngs)

  def __call__(
    self,
    x_BNMD: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
    keep: Callable[[jax.Array, jax.Array], Any] = lambda k, v: None,
  ) -> tuple[jax.Array, Any]:
    """Computes whole spans (or their first M slots) at once.

    Returns:
      The normed output [B, N, M, D], and `keep(k_BNMHK, v_BNMHK)` of every layer, stacked.
    """
    slots_M = jnp.arange(x_BNMD.shape[2])
    graph, layers = nnx.split(self.blocks)
    layers = stacked(layers)
    keys = None if dropout_key is None else jax.random.split(dropout_key, self.level.num_layers)

    def layer(x_BNMD, layer_and_key):
      parameters, key = layer_and_key
      x_BNMD = row_major(x_BNMD, spec_of(x_BNMD))
      x_BNMD, kv = nnx.merge(graph, parameters)(x_BNMD, slots_M=slots_M, dropout_key=key)
      return x_BNMD, keep(*kv)

    options = self.options
    scans = scans_layers(options)
    layer = rematerialised(layer, options.remat, is_in_loop=scans)
    unroll = 1 if scans else self.level.num_layers
    x_BNMD, kept = jax.lax.scan(layer, x_BNMD, (layers, keys), unroll=unroll)
    return self.norm(x_BNMD), kept

  def empty_cache(self, batch: int, slots: int) -> Cache:
    """Makes a cache for a span of `slots` slots."""
    heads, width = self.level.heads
    shape = (self.level.num_layers, batch, 1, self.level.cross_patch + slots, heads, width)
    zeros = functools.partial(jnp.zeros, shape, compute_dtype(self.options))
    return Cache(zeros(), zeros())

  def step(
    self, x_B11D: jax.Array, cache: Cache, slot: jax.Array, has_previous: jax.Array | bool
  ) -> tuple[jax.Array, Cache]:
    """Computes one slot from the cache of the earlier ones, by the block of training or, on one GPU, its faster twins.

    Args:
      x_B11D: the slot's input.
      cache: as left by the slots before.
      slot: its number within the span.
      has_previous: whether a span lies before this one (used with cross-patch attention only).
    """
    slot, r, window = jnp.asarray(slot), self.level.cross_patch, self.level.attention_window  # a number without jit
    first = jnp.maximum(jnp.where(has_previous, 0, r), r + slot - window + 1 if window else 0)  # entry that is seen
    if self._in_one_kernel(x_B11D.shape[0]):
      x_D, *kv = decoding_step.step(
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
      return normalised(self.norm, x_B11D), _written(cache, [jnp.stack(a) for a in zip(*new, strict=True)], r + slot)
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
    """Tells whether a step is one kernel: `in_compute_dtype` (build.py) has left the layers stacked for it."""
    parameter, dtype = self.blocks.qkv.kernel.get_value(), compute_dtype(self.options)
    return (
      not isinstance(parameter, tuple)
      and (isinstance(parameter, Quantised) or parameter.dtype == dtype)
      and cached_attention.wanted(self.options, dtype)
      and each_in_one_kernel(self.options, rows)
    )

  def next_span(self, cache: Cache) -> Cache:
    """Moves the last r slots of the cache to the front, to slots -r .. -1, at the start of the next span."""
    r = self.level.cross_patch
    slots = cache.k_LBNSHK.shape[3] - r
    k_tail, v_tail = (a[:, :, :, slots:] for a in cache)
    k_tail = jax.vmap(rotate, in_axes=(0, None))(k_tail, jnp.full((r,), -slots))
    return Cache(cache.k_LBNSHK.at[:, :, :, :r].set(k_tail), cache.v_LBNSHK.at[:, :, :, :r].set(v_tail))


def _written(cache: Cache, new_LB11HK: Sequence[jax.Array], at: jax.Array) -> Cache:
  """The cache with the keys and values of one slot, of all layers, at its entry `at`."""
  put = jax.lax.dynamic_update_slice_in_dim
  return Cache(*(put(a, b, at, axis=3) for a, b in zip(cache, new_LB11HK, strict=True)))


def each_in_one_kernel(config: ModelConfig, rows: int) -> bool:
  """Returns whether decoding_step.py takes each of the model's stacks; parameters are laid out for all or none."""
  return not any(decoding_step.obstacle(level, config, rows) for level in config.levels)


def stack_weights(stack: Stack) -> decoding_step.Weights:
  """Returns the stacked parameters as decoding_step.py takes them: no copies where they lie as build.py puts them."""
  blocks, level = stack.blocks, stack.level
  (heads, width), L, D = level.heads, level.num_layers, level.width
  (qkv_LD3HK, qkv_scale), (out_LHKD, out_scale) = _parts(blocks.qkv), _parts(blocks.attention_out)
  (ff_in, ff_in_scale), (ff_out_LFD, ff_out_scale) = _parts(blocks.ff_in), _parts(blocks.ff_out)
  bias = blocks.qkv.bias is not None
  shift = getattr(blocks.attention_norm, "bias", None) is not None
  return decoding_step.Weights(
    qkv_LD3HK.transpose(0, 2, 3, 4, 1).reshape(L, 3, heads, 2, width // 2, D),
    blocks.qkv.bias[...].reshape(L, 3, heads, 2, width // 2) if bias else None,
    out_LHKD.transpose(0, 3, 1, 2).reshape(L, D, heads * width),
    blocks.attention_out.bias[...] if bias else None,
    ff_in.reshape(L, D, -1).transpose(0, 2, 1),
    blocks.ff_in.bias[...].reshape(L, -1) if bias else None,
    ff_out_LFD.transpose(0, 2, 1),
    blocks.ff_out.bias[...] if bias else None,
    blocks.attention_norm.scale[...],
    blocks.attention_norm.bias[...] if shift else None,
    blocks.ff_norm.scale[...],
    blocks.ff_norm.bias[...] if shift else None,
    None if qkv_scale is None else qkv_scale.reshape(L, 3, heads, 2, width // 2),
    out_scale,
    None if ff_in_scale is None else ff_in_scale.reshape(L, -1),
    ff_out_scale,
  )


def _parts(linear: Linear) -> tuple[jax.Array, jax.Array | None]:
  """The weights of a stack's product, and their scales where they are in 8 bits."""
  kernel = linear.kernel.get_value()
  return (kernel.values, kernel.scale) if isinstance(kernel, Quantised) else (kernel, None)


# The layers' parameters as a tuple of arrays instead of a stacked one: no step has to cut its layer's out of a stack.


def unstacked(parameter: nnx.Variable) -> nnx.Variable:
  """Makes a parameter of stacked blocks a tuple of the blocks' own."""
  value = parameter.get_value()
  layers = len(jax.tree.leaves(value)[0])
  return parameter.replace(tuple(jax.tree.map(lambda a, i=i: a[i], value) for i in range(layers)))


def is_unstacked(layers: nnx.State) -> bool:
  """Returns True if the parameters of blocks are tuples."""
  return isinstance(_variables(layers)[0].get_value(), tuple)


def layer_of(layers: nnx.State, i: int) -> nnx.State:
  """Takes the parameters of layer i."""
  return _map_variables(lambda a: a.replace(a.get_value()[i]), layers)


def stacked(layers: nnx.State) -> nnx.State:
  """Stacks the parameters of blocks along a first axis of layers, whatever their form."""
  if not is_unstacked(layers):
    return layers
  return _map_variables(lambda a: a.replace(jax.tree.map(lambda *each: jnp.stack(each), *a.get_value())), layers)


def _variables(layers):
  return jax.tree.leaves(layers, is_leaf=is_variable)


def _map_variables(function, layers):
  return jax.tree.map(function, layers, is_leaf=is_variable)


def scans_layers(options: ModelConfig) -> bool:
  """Tells whether layers are a loop in the compiled program, rather than one after the other."""
  return options.scan_layers == "always" or (options.scan_layers == "auto" and platform() != "gpu")


def rematerialised(layer: Callable, remat: str, *, is_in_loop: bool) -> Callable:
  """Wraps `layer` so that its activations are recomputed in the backward pass, as `BlockOptions.remat` says."""
  if remat == "none":
    return layer
  kept = ["qkv", "attended", "hidden"] if remat == "named" else []
  axes = mesh_axes()
  if kept and max(axes.get("tensor", 1), axes.get("fsdp", 1)) > 1:
    # After attention: recomputed, it would be summed over devices again, or be a product with weights gathered again,
    # which XLA cannot merge with the first.
    kept.append("mixed")
  policy = jax.checkpoint_policies.save_only_these_names(*kept)
  # Inside a loop nothing can be merged anyway. Outside, XLA may keep what is cheap to keep, unless memory is short.
  return jax.checkpoint(layer, policy=policy, prevent_cse=remat == "full" and not is_in_loop)
