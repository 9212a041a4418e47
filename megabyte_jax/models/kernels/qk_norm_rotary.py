"""Computes queries and keys from their projections on a GPU: QK-norm and rotary positions, one kernel each way.

As in rms_norm_swiglu.py: XLA would read the arrays several times.

Shapes: B batch, N spans, M slots of a span, H heads, K head width, F = K / 2 pairs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from megabyte_jax.models.kernels.rms_norm_swiglu import ROWS, Shaped, compiler_params, obstacle, on_mesh
from megabyte_jax.parallel.activation_layout import mesh_axes, spec_of

_TILE = 32  # rows of a program


def qk_norm_rotary_obstacle(q_BNMHK: Shaped) -> str:
  """Returns why `qk_norm_rotary` cannot serve here, or ''."""
  M, K = q_BNMHK.shape[2], q_BNMHK.shape[-1]
  if M == 1:
    return "a single slot is left to XLA"
  if K & (K - 1) or not 32 <= K <= 256:
    return f"head_dim {K} is not a power of two from 32 to 256"
  parts = mesh_axes().get("seq", 1) if q_BNMHK.shape[1] == 1 else 1
  if M % (parts * _TILE) and (parts > 1 or _TILE % M):
    return f"tiles of {_TILE} rows do not fit the {M / parts:g} slots of a device's spans"
  return obstacle(q_BNMHK, spec_of(q_BNMHK, "tensor"), _TILE)


def qk_norm_rotary(
  q_BNMHK: jax.Array,
  k_BNMHK: jax.Array,
  angles_MF: jax.Array,
  norms: tuple[nnx.RMSNorm, nnx.RMSNorm] | None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes rotary positions of queries and keys, after RMSNorm over a head's width if there are norms.

  Args:
    angles_MF: by which the pair (x_i, x_{i+K/2}) of each slot is turned, [M, K / 2].
    norms: of queries and keys; they have the same epsilon.
    interpret: run the kernel step by step on any device (tests).
  """
  times = max(1, _TILE // angles_MF.shape[0])  # a program's rows may be several spans
  tables = tuple(jnp.tile(table, (times, 1)) for table in (jnp.cos(angles_MF), jnp.sin(angles_MF)))
  scales = jnp.stack([_scale(norm) for norm in norms]) if norms else None
  return _turn(q_BNMHK, k_BNMHK, tables, scales, norms[0].epsilon if norms else 0.0, interpret)


def _scale(norm: nnx.RMSNorm) -> jax.Array:
  assert norm.scale is not None
  return norm.scale[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _turn(q, k, tables, scales_2K, epsilon, interpret):
  return _call(_turn_kernel, "qk_norm_rotary", (q, k), tables, scales_2K, epsilon, interpret, False)


def _turn_forward(q, k, tables, scales_2K, epsilon, interpret):
  heads = () if scales_2K is None else (q, k)  # without norms the gradients do not depend on them
  return _turn(q, k, tables, scales_2K, epsilon, interpret), (heads, tables, scales_2K)


def _turn_backward(epsilon, interpret, saved, gradients):
  heads, tables, scales_2K = saved
  arrays, makes_sums = (*heads, *gradients), scales_2K is not None
  dq, dk, *sums = _call(
    _turn_backward_kernel, "qk_norm_rotary_gradient", arrays, tables, scales_2K, epsilon, interpret, makes_sums
  )
  no_gradients = jax.tree.map(jnp.zeros_like, tables)  # positions are no parameters
  return dq, dk, no_gradients, jnp.sum(sums[0], axis=0) if sums else None


_turn.defvjp(_turn_forward, _turn_backward)


def _call(kernel, name, arrays, tables, scales_2K, epsilon, interpret, makes_sums):
  """Runs a kernel over tiles: two results like q and k, and, if it makes them, sums for the scales of each program."""
  scales = () if scales_2K is None else (scales_2K,)

  def on_device(arrays, tables, scales):
    *rows, H, K = arrays[0].shape
    R = math.prod(rows)
    tile = pl.BlockSpec((_TILE, H, K), lambda i: (i, 0, 0))
    repeats = tables[0].shape[0] // _TILE
    table = pl.BlockSpec((_TILE, K // 2), lambda i: (i % repeats, 0))
    out_specs, out_shapes = [tile] * 2, [jax.ShapeDtypeStruct((R, H, K), arrays[0].dtype)] * 2
    if makes_sums:
      out_specs = [*out_specs, pl.BlockSpec((None, 2, K), lambda i: (i, 0, 0))]
      out_shapes = [*out_shapes, jax.ShapeDtypeStruct((R // _TILE, 2, K), jnp.float32)]
    out = pl.pallas_call(
      functools.partial(kernel, epsilon=epsilon, norm=bool(scales)),
      grid=(R // _TILE,),
      in_specs=[tile] * len(arrays) + [table] * 2 + [pl.BlockSpec((2, K), lambda i: (0, 0))] * len(scales),
      out_specs=out_specs,
      out_shape=out_shapes,
      compiler_params=compiler_params(),
      interpret=interpret,
      name=name,
    )(*(a.reshape(R, H, K) for a in arrays), *tables, *scales)
    return (*(a.reshape(arrays[0].shape) for a in out[:2]), *out[2:])

  spec = spec_of(arrays[0], "tensor")
  of_table = P("seq") if arrays[0].shape[1] == 1 else P()
  in_specs = ((spec,) * len(arrays), (of_table,) * 2, (P(),) * len(scales))
  out_specs = (spec, spec, P((*ROWS, "tensor"))) if makes_sums else (spec, spec)
  return on_mesh(on_device, in_specs, out_specs)(arrays, tables, scales)


def _halves(ref: Any, *at: Any) -> tuple[jax.Array, ...]:
  """Reads the two halves of a head's numbers, float32, [rows, K / 2]."""
  half = ref.shape[-1] // 2
  return tuple(ref[(*at, pl.ds(first, half))].astype(jnp.float32) for first in (0, half))


def _write_halves(ref, halves, *at):
  half = ref.shape[-1] // 2
  for first, values in zip((0, half), halves, strict=True):
    ref[(*at, pl.ds(first, half))] = values.astype(ref.dtype)


def _inverse_deviation(a, b, epsilon):
  return jax.lax.rsqrt((jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)) / (2 * a.shape[1]) + epsilon)[:, None]


_ALL = slice(None)


def _turn_kernel(q_ref, k_ref, cos_ref, sin_ref, *refs, epsilon, norm):
  scales_ref, *results = refs if norm else (None, *refs)
  cos, sin = cos_ref[...], sin_ref[...]
  scales = [_halves(scales_ref, pl.ds(i, 1)) for i in range(2)] if norm else [(), ()]

  def head(h, _):
    for x_ref, y_ref, scale in zip((q_ref, k_ref), results, scales, strict=True):
      a, b = _halves(x_ref, _ALL, h)
      if norm:
        root = _inverse_deviation(a, b, epsilon)
        a, b = ((x * (root * s)).astype(x_ref.dtype).astype(jnp.float32) for x, s in zip((a, b), scale, strict=True))
      _write_halves(y_ref, (a * cos - b * sin, b * cos + a * sin), _ALL, h)

  jax.lax.fori_loop(0, q_ref.shape[1], head, None)


def _turn_backward_kernel(*refs, epsilon, norm):
  heads, (dq_ref, dk_ref, cos_ref, sin_ref, *rest) = (refs[:2], refs[2:]) if norm else ((None, None), refs)
  scales_ref, *results = rest if norm else (None, *rest)
  cos, sin = cos_ref[...], sin_ref[...]
  scales = [_halves(scales_ref, pl.ds(i, 1)) for i in range(2)] if norm else [(), ()]

  def head(h, sums):
    new = []
    for i, x_ref in enumerate(heads):
      dy_ref, dx_ref, scale = (dq_ref, dk_ref)[i], results[i], scales[i]
      da, db = _halves(dy_ref, _ALL, h)
      da, db = da * cos + db * sin, db * cos - da * sin
      if norm:
        a, b = _halves(x_ref, _ALL, h)
        root = _inverse_deviation(a, b, epsilon)
        new += [sums[2 * i] + da * a * root, sums[2 * i + 1] + db * b * root]
        da, db = da * scale[0], db * scale[1]
        dot = (jnp.sum(da * a, axis=1) + jnp.sum(db * b, axis=1))[:, None]
        shrink = root * root * root * dot / (2 * a.shape[1])
        da, db = da * root - a * shrink, db * root - b * shrink
      _write_halves(dx_ref, (da, db), _ALL, h)
    return tuple(new)

  nothing = (jnp.zeros(cos.shape, jnp.float32),) * 4 if norm else ()
  sums = jax.lax.fori_loop(0, dq_ref.shape[1], head, nothing)
  for i in range(len(sums) // 2):
    totals = (jnp.sum(part, axis=0)[None] for part in sums[2 * i : 2 * i + 2])
    _write_halves(results[2], totals, pl.ds(i, 1))
