"""Kernels of one decoding step on a GPU, for the few rows of a batch: what counts is how often the chip has to wait.

A step reads every weight once for a handful of rows. Each kernel costs microseconds before it reads at full speed,
so a layer is five of them: the norm is part of the product after it, bias and residual of the product before,
and attention reads the filled part of the cache alone. Weights are read along the input axis (`decoding_layouts` in
build.py puts them so).

Sums and statistics are float32; a result is rounded once, where a chain of operations rounds after each of them.
Pallas (Triton) kernels, interpreted where there is no GPU.

Shapes: R rows, D inputs of a product, F its outputs, H heads, K head width, S slots of a cache, L layers, P parts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from megabyte_jax.hardware import platform, row_major
from megabyte_jax.models.config import BlockOptions, Level

_MAX_ROWS = 64  # up to which a program holds all rows; above, cuBLAS does as well
_SUM_ROWS = 4  # up to which sums of products beat tensor cores, which take 16 rows at least
_PROGRAMS = 128  # about one for each multiprocessor
_SUM_TILE = 1 << 14  # weights that a program has in registers at once
_CHUNK = 2048  # inputs that it takes at once, at most
_SUM_WARPS = 4
_SLOTS = 128  # of a cache that a program of an attention has in registers at once
_SHORT = 16  # slots of a cache, up to which the product after the attention does it
_LOWEST, _SMALLEST = -1e30, 1e-30  # of logits that are not there, of sums


class Norm(NamedTuple):
  """LayerNorm, or RMSNorm if it has no mean to take away.

  Attributes:
    scale_D, shift_D: float32; no shift is None.
    centered: whether it subtracts the mean.
    epsilon: added to the variance.
  """

  scale_D: jax.Array
  shift_D: jax.Array | None
  centered: bool
  epsilon: float


class Parts(NamedTuple):
  """Attention in parts of the cache that are still to be added up.

  Attributes:
    out_PRD: float32, the attended values of each part, heads side by side.
    log_sum_PRD: float32, the logarithm of each part's sum of exponentials, repeated for each value of a head.
  """

  out_PRD: jax.Array
  log_sum_PRD: jax.Array


def on_one_gpu(dtype: jnp.dtype) -> bool:
  """Whether the program at hand is for one GPU, in bfloat16."""
  mesh = jax.sharding.get_abstract_mesh()
  return platform() == "gpu" and (mesh.empty or mesh.size == 1) and dtype == jnp.bfloat16


def serves(level: Level, options: BlockOptions) -> bool:
  """Whether the kernels take the sizes of this level."""
  heads, head_width = level.heads
  widths = level.width, options.hidden(level), heads * head_width
  return head_width >= 16 and head_width == _power_of_two(head_width) and not any(width % 64 for width in widths)


def product(
  x_RD: jax.Array | Parts | Short,
  weight_FD: jax.Array,
  bias_F: jax.Array | None = None,
  *,
  norm: Norm | None = None,
  activation: Callable | None = None,
  added_RF: jax.Array | None = None,
  out_dtype: jnp.dtype | None = None,
) -> jax.Array:
  """added + activation(norm(x) @ weight.T + bias), [R, F].

  Args:
    x_RD: the rows, or an attention that is still to be done or added up.
    weight_FD: transposed, so that its rows are read as they lie.
    norm: rounded to the dtype of the weights, as it would be outside of the kernel.
    out_dtype: default the weights'.
  """
  if isinstance(x_RD, jax.Array) and x_RD.shape[0] > _MAX_ROWS:
    return _product_of_many(x_RD, weight_FD, bias_F, norm, activation, added_RF, out_dtype)
  F, D = weight_FD.shape
  given = _operands(x_RD) | dict(
    w=weight_FD,
    bias=bias_F,
    scale=norm and norm.scale_D,
    shift=norm and norm.shift_D,
    added=added_RF,
  )
  operands = {name: a for name, a in given.items() if a is not None}
  R = operands["x"].shape[1 if isinstance(x_RD, Parts) else 0]
  sums = R <= _SUM_ROWS
  columns, chunk, warps, stages = _sum_tiles(F, D) if sums else _dot_tiles(R, F, D)

  def kernel(*refs):
    *ins, out = refs
    named = dict(zip(operands, ins, strict=True))
    at = pl.ds(pl.program_id(0) * columns, columns)
    y_RC = (_sums if sums else _dots)(named, norm, R, D, at, columns, chunk)
    for r, y in enumerate(y_RC) if sums else [(None, y_RC)]:
      _finish(named, out, r, y, at, activation)

  return pl.pallas_call(
    kernel,
    grid=(F // columns,),
    out_shape=jax.ShapeDtypeStruct((R, F), out_dtype or weight_FD.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=platform() != "gpu",
    name=f"{'normed_' if norm else ''}product{'_added' if added_RF is not None else ''}",
  )(*operands.values())


def _product_of_many(x_RD, weight_FD, bias_F, norm, activation, added_RF, out_dtype):
  """`product` by XLA."""
  dtype = weight_FD.dtype
  if norm is not None:
    x_RD = x_RD.astype(jnp.float32)
    x_RD = x_RD - x_RD.mean(axis=1, keepdims=True) if norm.centered else x_RD
    x_RD *= jax.lax.rsqrt(jnp.mean(x_RD * x_RD, axis=1, keepdims=True) + norm.epsilon) * norm.scale_D
    x_RD = (x_RD if norm.shift_D is None else x_RD + norm.shift_D).astype(dtype)
  y_RF = jnp.einsum("RD,FD->RF", x_RD, row_major(weight_FD), preferred_element_type=out_dtype or dtype)
  y_RF = y_RF if bias_F is None else y_RF + bias_F
  y_RF = y_RF if activation is None else activation(y_RF)
  return y_RF if added_RF is None else y_RF + added_RF


def _operands(x: jax.Array | Parts | Short) -> dict[str, jax.Array]:
  """The rows by the names that kernels know them by."""
  if isinstance(x, Parts):
    return dict(x=x.out_PRD, log_sum=x.log_sum_PRD)
  if isinstance(x, Short):
    return dict(
      x=x.qkv_R3HK, k_cache=x.past.k_LRSHK, v_cache=x.past.v_LRSHK, layer=x.past.layer_1, slots=x.past.slots_2
    )
  return dict(x=x)


def _sum_tiles(F: int, D: int) -> tuple[int, int, int, int]:
  """(columns of a program, inputs it takes at once, warps, stages) of sums of products."""
  chunk = math.gcd(D, _CHUNK)
  columns = math.gcd(F, _SUM_TILE // chunk)
  while columns > 4 and F // columns < _PROGRAMS:
    columns //= 2
  return columns, chunk, _SUM_WARPS, 1


def _dot_tiles(R: int, F: int, D: int) -> tuple[int, int, int, int]:
  """The same of products on tensor cores."""
  columns = math.gcd(F, 32 if F // 32 >= _PROGRAMS // 2 else 16)
  return columns, math.gcd(D, 512 if R <= 16 else 128), 4, 4


def _power_of_two(n: int) -> int:
  return 1 << (n - 1).bit_length()


def _sums(refs, norm, R, D, at, columns, chunk):
  """Of each row its [C] products, float32. The weights are asked for before the rows are waited for."""
  chunks = [pl.ds(start, chunk) for start in range(0, D, chunk)]
  first_CD = refs["w"][at, chunks[0]]
  rows = [_row(refs, norm, r, D, chunks) for r in range(R)]
  y_RC = [jnp.zeros((columns,), jnp.float32) for _ in range(R)]
  for i, where in enumerate(chunks):
    w_CD = (first_CD if i == 0 else refs["w"][at, where]).astype(jnp.float32)
    y_RC = [y + jnp.sum(w_CD * row[i][None, :], axis=1) for y, row in zip(y_RC, rows, strict=True)]
  return y_RC


def _row(refs, norm, r, D, chunks):
  """Row r in chunks, float32: normed, or added up from parts."""
  if "k_cache" in refs:
    return [_attend_short(refs, r)]
  if "log_sum" in refs:
    return [_added_up(refs, r, where) for where in chunks]
  x = [refs["x"][r, where].astype(jnp.float32) for where in chunks]
  if norm is None:
    return x
  mean = sum(jnp.sum(a) for a in x) / D if norm.centered else 0.0
  x = [a - mean for a in x]
  factor = jax.lax.rsqrt(sum(jnp.sum(a * a) for a in x) / D + norm.epsilon)
  return [_scaled(refs, a * factor, where).astype(jnp.float32) for a, where in zip(x, chunks, strict=True)]


def _scaled(refs, x, where):
  """x * scale + shift, rounded as the weights are."""
  x *= refs["scale"][where]
  return (x + refs["shift"][where] if "shift" in refs else x).astype(refs["w"].dtype)


def _added_up(refs, r, where):
  """The attended values of row r from those of its parts."""
  parts = range(refs["x"].shape[0])
  log_sums = [refs["log_sum"][p, r, where] for p in parts]
  largest = functools.reduce(jnp.maximum, log_sums)
  weights = [jnp.exp(a - largest) for a in log_sums]
  total = sum(w * refs["x"][p, r, where] for p, w in zip(parts, weights, strict=True)) / sum(weights)
  return total.astype(refs["w"].dtype).astype(jnp.float32)


def _dots(refs, norm, R, D, at, columns, chunk):
  """[R', C] products on tensor cores, float32; R' is R rounded up."""
  rows = max(_power_of_two(R), 16)
  inside_RD = jnp.broadcast_to((jnp.arange(rows) < R)[:, None], (rows, chunk))

  def x_at(where):
    ref = refs["x"].at[pl.ds(0, rows), where]
    return plgpu.load(ref) if rows == R else plgpu.load(ref, mask=inside_RD, other=0)

  if norm is not None:

    def add(i, sums):
      x = x_at(pl.ds(i * chunk, chunk)).astype(jnp.float32)
      return sums[0] + jnp.sum(x, axis=1), sums[1] + jnp.sum(x * x, axis=1)

    zeros_R = jnp.zeros((rows,), jnp.float32)
    sum_R, square_R = jax.lax.fori_loop(0, D // chunk, add, (zeros_R, zeros_R))
    mean_R = sum_R / D if norm.centered else zeros_R
    factor_R = jax.lax.rsqrt(jnp.maximum(square_R / D - mean_R * mean_R, 0) + norm.epsilon)

  def multiply(i, y_RC):
    where = pl.ds(i * chunk, chunk)
    x_RD = x_at(where)
    if norm is not None:
      x_RD = (x_RD.astype(jnp.float32) - mean_R[:, None]) * factor_R[:, None]
      x_RD *= refs["scale"][where][None, :]
      x_RD = (x_RD + refs["shift"][where][None, :] if "shift" in refs else x_RD).astype(refs["w"].dtype)
    contract = (((1,), (1,)), ((), ()))
    return y_RC + jax.lax.dot_general(x_RD, refs["w"][at, where], contract, preferred_element_type=jnp.float32)

  return jax.lax.fori_loop(0, D // chunk, multiply, jnp.zeros((rows, columns), jnp.float32))


def _finish(refs, out, r, y, at, activation):
  """Adds bias and residual to the float32 products of row r ([C]), or of all rows ([R', C]), and stores them."""
  R, several = out.shape[0], y.ndim == 2
  if "bias" in refs:
    y += refs["bias"][at].astype(jnp.float32)
  if activation is not None:
    y = activation(y)
  where = (pl.ds(0, y.shape[0]) if several else r, at)
  if several and y.shape[0] > R:
    mask = jnp.broadcast_to((jnp.arange(y.shape[0]) < R)[:, None], y.shape)
    if "added" in refs:
      y += plgpu.load(refs["added"].at[where], mask=mask, other=0).astype(jnp.float32)
    plgpu.store(out.at[where], y.astype(out.dtype), mask=mask)
  else:
    out[where] = (y + refs["added"][where].astype(jnp.float32) if "added" in refs else y).astype(out.dtype)


class Filled(NamedTuple):
  """What a single slot sees of a stack's cache.

  Attributes:
    k_LRSHK, v_LRSHK: keys and values of all layers.
    layer_1: int32 [1]; an operand, so that the kernels of all layers are the same.
    slots_2: int32 [2], from which slot on and up to which it sees them.
  """

  k_LRSHK: jax.Array
  v_LRSHK: jax.Array
  layer_1: jax.Array
  slots_2: jax.Array


class Short(NamedTuple):
  """Attention to few slots that is left to the product after it: each program of that does it again."""

  qkv_R3HK: jax.Array
  past: Filled


def attend(qkv_R3HK: jax.Array, past: Filled) -> jax.Array | Parts | Short:
  """One slot of each row, its query, key and value, attends to itself and to what it sees of the cache.

  Returns:
    The attended values [R, H * K]; or what `product` makes them of, where a kernel of their own would be too small
    for the chip.
  """
  R, _, H, K = qkv_R3HK.shape
  S = past.k_LRSHK.shape[2]
  if R <= _SUM_ROWS and S <= _SHORT and H * K == _power_of_two(H * K) <= _CHUNK:
    return Short(qkv_R3HK, past)
  slots = min(_SLOTS, _power_of_two(S))
  parts = 1
  while R <= _SUM_ROWS and parts < 8 and R * H * parts < 2 * _PROGRAMS and 2 * parts * slots <= S:
    parts *= 2

  def kernel(qkv_ref, k_cache, v_cache, layer_ref, slots_ref, out_ref, *log_sum_ref):
    row, head, part = (pl.program_id(i) for i in range(3))
    layer, first, end = layer_ref[0], slots_ref[0], slots_ref[1]
    q_K, k_K, v_K = (qkv_ref[row, i, head].astype(jnp.float32) for i in range(3))
    q_K *= K**-0.5
    per_part = pl.cdiv(pl.cdiv(end - first, parts), slots) * slots
    begin = first + part * per_part
    stop = jnp.minimum(begin + per_part, end)
    own = (part == 0).astype(jnp.float32)  # the slot itself
    largest = jnp.where(part == 0, jnp.sum(q_K * k_K), _LOWEST)
    total, out_K = own, own * v_K

    def add(i, carry):
      largest, total, out_K = carry
      start = begin + i * slots
      inside_S = start + jnp.arange(slots) < stop
      mask_SK = jnp.broadcast_to(inside_S[:, None], (slots, K))
      cached = (ref.at[layer, row, pl.ds(start, slots), head] for ref in (k_cache, v_cache))
      k_SK, v_SK = (plgpu.load(ref, mask=mask_SK, other=0).astype(jnp.float32) for ref in cached)
      logits_S = jnp.where(inside_S, jnp.sum(q_K[None, :] * k_SK, axis=1), _LOWEST)
      new = jnp.maximum(largest, jnp.max(logits_S))
      weights_S, kept = jnp.exp(logits_S - new), jnp.exp(largest - new)
      return new, total * kept + jnp.sum(weights_S), out_K * kept + jnp.sum(weights_S[:, None] * v_SK, axis=0)

    rounds = pl.cdiv(jnp.maximum(stop - begin, 0), slots)
    largest, total, out_K = jax.lax.fori_loop(0, rounds, add, (largest, total, out_K))
    total = jnp.maximum(total, _SMALLEST)  # a part may have no slots
    to = (*((part, row) if parts > 1 else (row,)), pl.ds(head * K, K))
    out_ref[to] = (out_K / total).astype(out_ref.dtype)
    for ref in log_sum_ref:
      ref[to] = jnp.broadcast_to(largest + jnp.log(total), (K,))

  out_shape: jax.ShapeDtypeStruct | list[jax.ShapeDtypeStruct]
  if parts > 1:
    out_shape = [jax.ShapeDtypeStruct((parts, R, H * K), jnp.float32)] * 2
  else:
    out_shape = jax.ShapeDtypeStruct((R, H * K), qkv_R3HK.dtype)
  made = pl.pallas_call(
    kernel,
    grid=(R, H, parts),
    out_shape=out_shape,
    compiler_params=plgpu.CompilerParams(num_warps=4 if slots > 16 else 1, num_stages=1),
    interpret=platform() != "gpu",
    name="attend",
  )(qkv_R3HK, *past)
  return Parts(*made) if parts > 1 else made


def _attend_short(refs, r):
  """The attended values of row r, of all heads side by side, float32."""
  S = refs["k_cache"].shape[2]
  layer, first, end = refs["layer"][0], refs["slots"][0], refs["slots"][1]
  q_HK, k_HK, v_HK = (refs["x"][r, i].astype(jnp.float32) for i in range(3))
  logits, values = [jnp.sum(q_HK * k_HK, axis=1)], [v_HK]
  for s in range(S):
    k_HK, v_HK = (refs[name][layer, r, s].astype(jnp.float32) for name in ("k_cache", "v_cache"))
    seen = jnp.broadcast_to((s >= first) & (s < end), q_HK.shape[:1])
    logits.append(jnp.where(seen, jnp.sum(q_HK * k_HK, axis=1), _LOWEST))
    values.append(v_HK)
  largest_H = functools.reduce(jnp.maximum, logits)
  weights = [jnp.exp((a - largest_H) * q_HK.shape[1] ** -0.5) for a in logits]
  total_H = functools.reduce(jnp.add, weights)
  out_HK = sum(w_H[:, None] * v_HK for w_H, v_HK in zip(weights, values, strict=True)) / total_H[:, None]
  return out_HK.astype(refs["w"].dtype).astype(jnp.float32).reshape(-1)
