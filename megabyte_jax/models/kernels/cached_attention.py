"""Computes attention of a single new slot to the filled part of a cache, on one GPU.

XLA's would read the whole cache, zeros and all. This is a Pallas (Triton) kernel, interpreted where there is no GPU:
a program takes a head of a row and walks through the slots that it sees.

Shapes: R rows, H heads, K head width, S slots of a cache, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from megabyte_jax.config import BlockOptions, Level
from megabyte_jax.models.kernels.known_options import LAYER_BY_LAYER
from megabyte_jax.parallel.backend import nvidia_obstacle, platform, triton

_SLOTS = 128  # that a program has in registers at once
LOWEST, SMALLEST = -1e30, 1e-30  # of logits that are not there, of sums


def wanted(options: BlockOptions, dtype: jnp.dtype) -> bool:
  """Returns whether decoding takes kernels: where it can, unless attention=xla asks for their plain twins."""
  return options.attention != "xla" and on_one_gpu(dtype) and triton() is not None


def on_one_gpu(dtype: jnp.dtype) -> bool:
  """Returns whether the program at hand is for one GPU, in bfloat16."""
  mesh = jax.sharding.get_abstract_mesh()
  return not nvidia_obstacle(platform()) and (mesh.empty or mesh.size == 1) and dtype == jnp.bfloat16


def obstacle(level: Level, options: BlockOptions) -> str:
  """Returns why a step cannot go layer by layer with this kernel, or '' if it can."""
  _, head_width = level.heads
  if head_width < 16 or head_width & (head_width - 1):
    return f"heads of {head_width} are not a power of two from 16 on"
  return LAYER_BY_LAYER.obstacle(level, options)


class Filled(NamedTuple):
  """Holds what a single slot sees of a stack's cache.

  Attributes:
    k_LRSHK, v_LRSHK: keys and values of all layers.
    layer_1: int32 [1]; an operand, so that the kernels of all layers are the same.
    slots_2: int32 [2], from which slot on and up to which it sees them.
  """

  k_LRSHK: jax.Array
  v_LRSHK: jax.Array
  layer_1: jax.Array
  slots_2: jax.Array


def attend(qkv_R3HK: jax.Array, past: Filled) -> jax.Array:
  """Returns the attended values [R, H, K] of one slot of each row, over itself and what it sees of the cache."""
  R, _, H, K = qkv_R3HK.shape
  slots = min(_SLOTS, 1 << (past.k_LRSHK.shape[2] - 1).bit_length())

  def kernel(qkv_ref, k_cache, v_cache, layer_ref, slots_ref, out_ref):
    row, head = (pl.program_id(i) for i in range(2))
    layer, first, end = layer_ref[0], slots_ref[0], slots_ref[1]
    q_K, k_K, v_K = (qkv_ref[row, i, head].astype(jnp.float32) for i in range(3))
    q_K *= K**-0.5

    def add(i, carry):
      start = first + i * slots
      inside_S = start + jnp.arange(slots) < end
      mask_SK = jnp.broadcast_to(inside_S[:, None], (slots, K))
      cached = (ref.at[layer, row, pl.ds(start, slots), head] for ref in (k_cache, v_cache))
      k_SK, v_SK = (triton().load(ref, mask=mask_SK, other=0) for ref in cached)
      return softmax_step(carry, q_K, k_SK, v_SK, inside_S)

    own = jnp.sum(q_K * k_K), jnp.float32(1), v_K  # the slot itself
    _, total, out_K = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(end - first, 0), slots), add, own)
    out_ref[row, head] = (out_K / total).astype(out_ref.dtype)

  return pl.pallas_call(
    kernel,
    grid=(R, H),
    out_shape=jax.ShapeDtypeStruct((R, H, K), qkv_R3HK.dtype),
    compiler_params=triton().CompilerParams(num_warps=4 if slots > 16 else 1, num_stages=1),
    interpret=platform() != "gpu",
    name="attend",
  )(qkv_R3HK, *past)


Carry = tuple[jax.Array, jax.Array, jax.Array]  # largest logit, sum of exponentials, sum of values with these weights


def softmax_step(carry: Carry, q: jax.Array, k_S: jax.Array, v_S: jax.Array, inside_S: jax.Array) -> Carry:
  """Adds S slots, of which some are `inside`, to a softmax; q, and each slot of k and v, of any shape."""
  largest, total, out = carry
  k_S, v_S = k_S.astype(jnp.float32), v_S.astype(jnp.float32)
  logits_S = q[None] * k_S
  for _ in range(q.ndim):
    logits_S = jnp.sum(logits_S, axis=-1)
  logits_S = jnp.where(inside_S, logits_S, LOWEST)
  new = jnp.maximum(largest, jnp.max(logits_S))
  weights_S, kept = jnp.exp(logits_S - new), jnp.exp(largest - new)
  added = jnp.sum(weights_S.reshape(-1, *[1] * q.ndim) * v_S, axis=0)
  return new, total * kept + jnp.sum(weights_S), out * kept + added
