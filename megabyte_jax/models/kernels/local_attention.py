"""Computes causal attention within many short spans on a GPU: one Pallas (Triton) kernel in each direction.

A span of the local model is far smaller than the matrix units of a GPU. So spans that lie side by side make up a tile
of `_TILE` slots, and a slot sees the slots of its tile that lie in its own span and not after it, and its row of `past`
(the end of the previous span, in cross-patch attention) likewise. Logits and probabilities stay on the chip; backward
computes them again.

Shapes: B batch, N spans, M slots of a span, r earlier slots of each span, H heads, K head width; R = B * N * M rows,
S = B * N * r rows of the past.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from megabyte_jax.parallel.backend import triton

_TILE = 64  # slots of a tile
_SMALLEST = 16  # rows that a product on the matrix units has at least


def obstacle(q_BNMHK: jax.Array | jax.ShapeDtypeStruct, earlier: int) -> str:
  """Returns why the kernel cannot attend here, whatever the device, or ''; `earlier` is r, 0 without a past."""
  _, N, M, _, K = q_BNMHK.shape
  if M > _TILE or _TILE % M or N * M % _TILE:
    return f"{N} spans of {M} slots are not whole tiles of {_TILE}"
  if earlier and (earlier > M or M % earlier or _TILE // M * earlier < _SMALLEST):
    return f"{earlier} earlier slots do not divide the {M} slots of a span, or are too few"
  if K & (K - 1) or not 16 <= K <= 128:
    return f"head_dim {K} is not a power of two from 16 to 128"
  if q_BNMHK.dtype != jnp.bfloat16:
    return f"it needs bfloat16 and compute is {q_BNMHK.dtype}"
  return ""


def tile_attention(
  q_BNMHK: jax.Array,
  k_BNMHK: jax.Array,
  v_BNMHK: jax.Array,
  past: tuple[jax.Array, jax.Array, jax.Array] | None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Computes causal attention within spans, [B, N, M, H, K].

  Args:
    past: keys and values [B, N, r, H, K] that every slot of a span sees as well, and bool [N]: whether a span does.
    interpret: run the kernel step by step on any device (tests).
  """
  return _attention(q_BNMHK, k_BNMHK, v_BNMHK, past, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, past, interpret):
  return _call(_forward_kernel, 1, (q, k, v), past, interpret)[0]


def _attention_forward(q, k, v, past, interpret):
  return _attention(q, k, v, past, interpret), (q, k, v, past)


def _attention_backward(interpret, saved, gradient):
  q, k, v, past = saved
  dq, dk, dv, *of_past = _call(_backward_kernel, 3, (q, k, v, gradient), past, interpret)
  return dq, dk, dv, (*of_past, None) if past is not None else None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(kernel, results, arrays_BNMHK, past, interpret):
  """Runs a kernel over (tiles, heads): `results` outputs like q, and outputs like the past's in the backward pass."""
  B, N, M, H, K = arrays_BNMHK[0].shape
  row = jax.ShapeDtypeStruct((B * N * M, H, K), arrays_BNMHK[0].dtype)
  tile = pl.BlockSpec((_TILE, None, K), lambda i, h: (i, h, 0))
  inputs = [a.reshape(row.shape) for a in arrays_BNMHK]
  in_specs, out_specs, out_shapes = [tile] * len(inputs), [tile] * results, [row] * results
  r = 0
  if past is not None:
    k_past, v_past, sees_N = past
    r = k_past.shape[2]
    earlier = jax.ShapeDtypeStruct((B * N * r, H, K), k_past.dtype)
    earlier_tile = pl.BlockSpec((_TILE // M * r, None, K), lambda i, h: (i, h, 0))
    tiles_per_row = N * M // _TILE
    inputs += [k_past.reshape(earlier.shape), v_past.reshape(earlier.shape)]
    inputs.append(jnp.repeat(sees_N.astype(jnp.int32), M))
    in_specs += [earlier_tile, earlier_tile, pl.BlockSpec((_TILE,), lambda i, h: (i % tiles_per_row,))]
    if results > 1:
      out_specs, out_shapes = [*out_specs, earlier_tile, earlier_tile], [*out_shapes, earlier, earlier]
  out = pl.pallas_call(
    functools.partial(kernel, M=M, r=r),
    grid=(B * N * M // _TILE, H),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shapes,
    compiler_params=triton().CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name=kernel.__name__.strip("_"),
  )(*inputs)
  return [a.reshape(B, N, -1, H, K) for a in out]


def _product(a, b, contract_a, contract_b):
  """The product of two matrices over the given axes, float32."""
  return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


def _probabilities(q, k, k_past, sees, M, r):
  """Returns those of a tile, float32: [tile, tile] of its own slots and, with a past, [tile, earlier] of the others."""
  scale = q.shape[-1] ** -0.5
  lowest = float(jnp.finfo(jnp.float32).min)

  def places(columns):
    shape = (q.shape[0], columns)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)

  slot, other = places(k.shape[0])
  logits = jnp.where((slot // M == other // M) & (other <= slot), _product(q, k, 1, 1) * scale, lowest)
  largest = jnp.max(logits, axis=1, keepdims=True)  # of at least the slot itself
  if k_past is None:
    weights = jnp.exp(logits - largest)
    return weights / jnp.sum(weights, axis=1, keepdims=True), None
  slot, other = places(k_past.shape[0])
  visible = (slot // M == other // r) & (sees[:, None] > 0)
  logits_past = jnp.where(visible, _product(q, k_past, 1, 1) * scale, lowest)
  largest = jnp.maximum(largest, jnp.max(logits_past, axis=1, keepdims=True))
  weights, weights_past = jnp.exp(logits - largest), jnp.exp(logits_past - largest)
  total = jnp.sum(weights, axis=1, keepdims=True) + jnp.sum(weights_past, axis=1, keepdims=True)
  return weights / total, weights_past / total


def _forward_kernel(q_ref, k_ref, v_ref, *refs, M, r):
  k_past_ref, v_past_ref, sees_ref, out_ref = refs if r else (None, None, None, *refs)
  q, k, v = q_ref[...], k_ref[...], v_ref[...]
  p, p_past = _probabilities(q, k, k_past_ref[...] if r else None, sees_ref[...] if r else None, M, r)
  out = _product(p.astype(v.dtype), v, 1, 0)
  if r:
    out += _product(p_past.astype(v.dtype), v_past_ref[...], 1, 0)
  out_ref[...] = out.astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, gradient_ref, *refs, M, r):
  k_past_ref, v_past_ref, sees_ref, dq_ref, dk_ref, dv_ref, dk_past_ref, dv_past_ref = (
    refs if r else (None, None, None, *refs, None, None)
  )
  q, k, v, gradient = q_ref[...], k_ref[...], v_ref[...], gradient_ref[...]
  scale = q.shape[-1] ** -0.5
  k_past = k_past_ref[...] if r else None
  p, p_past = _probabilities(q, k, k_past, sees_ref[...] if r else None, M, r)
  dp = _product(gradient, v, 1, 1)
  dot = jnp.sum(p * dp, axis=1, keepdims=True)
  if r:
    dp_past = _product(gradient, v_past_ref[...], 1, 1)
    dot += jnp.sum(p_past * dp_past, axis=1, keepdims=True)
  ds = (p * (dp - dot) * scale).astype(q.dtype)
  dq = _product(ds, k, 1, 0)
  dk_ref[...] = _product(ds, q, 0, 0).astype(dk_ref.dtype)
  dv_ref[...] = _product(p.astype(v.dtype), gradient, 0, 0).astype(dv_ref.dtype)
  if r:
    ds_past = (p_past * (dp_past - dot) * scale).astype(q.dtype)
    dq += _product(ds_past, k_past, 1, 0)
    dk_past_ref[...] = _product(ds_past, q, 0, 0).astype(dk_past_ref.dtype)
    dv_past_ref[...] = _product(p_past.astype(v.dtype), gradient, 0, 0).astype(dv_past_ref.dtype)
  dq_ref[...] = dq.astype(dq_ref.dtype)
