"""Computes what lies between matrix products on a GPU: Pallas (Triton) kernels that read their arrays once.

RMSNorm, QK-norm with rotary positions, and the gradient of SwiGLU take as long as their arrays take to be read and
written. XLA reads them several times: once for the sums of a row, again for what is made of them, a third time for the
gradient of the scale. In small models, whose products are narrow, that is half of a step.

Like all kernels they run within `jax.shard_map` under a mesh; sums for the gradients of scales leave it as one row for
each program, so that XLA adds them up over devices.

Queries and keys are in qk_norm_rotary.py.

Shapes: B batch, N spans, M slots of a span, D width, F hidden; R = B * N * M rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from megabyte_jax.parallel.activation_layout import AXES, BATCH, mesh_axes, spec_of
from megabyte_jax.parallel.backend import nvidia_obstacle, platform, triton

_NUMBERS = 4096  # of an array that a program has in registers at once
_MOST_ROWS = 16
_ROUNDS = 8  # blocks of rows over which a program sums the gradient of a scale
_SMALLEST = 16  # part of a row that is worth a load

Shaped = jax.Array | jax.ShapeDtypeStruct


def obstacle(x: Shaped, spec: P, tile: int) -> str:
  """Returns why no kernel serves the rows of x, [B, N, M, ..], or ''.

  Args:
    spec: the mesh axes that x is spread over.
    tile: rows that a program takes, whose number must divide those of a device.
  """
  if problem := nvidia_obstacle(platform()):
    return problem
  if triton() is None:
    return "this JAX has no Pallas for Triton"
  if x.dtype != jnp.bfloat16:
    return f"it needs bfloat16 and compute is {x.dtype}"
  mesh = mesh_axes()
  if mesh and not mesh.keys() >= set(AXES):
    return f"the mesh has the axes {', '.join(mesh)} instead of {', '.join(AXES)}"
  own = list(x.shape)
  for i, axes in enumerate(spec):
    parts = math.prod(mesh.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    if own[i] % parts:
      return f"{parts} devices do not divide axis {i} of {x.shape}"
    own[i] //= parts
  rows = math.prod(own[:3])
  return f"{tile} rows do not divide the {rows} of a device" if rows % tile else ""


ROWS = (*BATCH, "seq")  # over which sums of rows are spread


def on_mesh(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
  """Returns the function of each device's part of its arrays, by `jax.shard_map` if there is a mesh."""
  if math.prod(mesh_axes().values()) == 1:
    return function
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def compiler_params() -> Any:
  """Returns how Triton compiles these kernels, which only wait for memory."""
  return triton().CompilerParams(num_warps=4, num_stages=1)


# --- RMSNorm. ---


def norm_obstacle(x_BNMD: Shaped) -> str:
  """Returns why `rms_norm` cannot serve here, or ''."""
  D = x_BNMD.shape[-1]
  if x_BNMD.shape[2] == 1:
    return "a single slot is left to XLA"
  if D % _SMALLEST:
    return f"width {D} is not a multiple of {_SMALLEST}"
  if D > _NUMBERS:
    return f"width {D} is above {_NUMBERS}, the most that a program has in registers"
  return obstacle(x_BNMD, spec_of(x_BNMD), _block_rows(D) * _ROUNDS)


def rms_norm(x_BNMD: jax.Array, norm: nnx.RMSNorm, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Computes RMSNorm over the width. Returns x itself and the result, [B, N, M, D].

  Use the returned x wherever else x is read, so that the gradients of both are added in the kernel.

  Args:
    norm: its scale and epsilon; statistics are float32, the result has its dtype.
    interpret: run the kernel step by step on any device (tests).
  """
  assert norm.scale is not None  # parameters.py gives every norm one
  return _rms_norm(x_BNMD, norm.scale[...], norm.epsilon, jnp.dtype(norm.dtype or x_BNMD.dtype), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms_norm(x, scale_D, epsilon, dtype, interpret):
  def on_device(x, scale_D):
    R, D = math.prod(x.shape[:3]), x.shape[-1]
    block = pl.BlockSpec((_block_rows(D), D), lambda i: (i, 0))
    y_RD = pl.pallas_call(
      functools.partial(_norm_kernel, epsilon=epsilon),
      grid=(R // _block_rows(D),),
      in_specs=[block, pl.BlockSpec((D,), lambda i: (0,))],
      out_specs=block,
      out_shape=jax.ShapeDtypeStruct((R, D), dtype),
      compiler_params=compiler_params(),
      interpret=interpret,
      name="rms_norm",
    )(x.reshape(R, D), scale_D)
    return y_RD.reshape(x.shape)

  return x, on_mesh(on_device, (spec_of(x), P()), spec_of(x))(x, scale_D)


def _rms_norm_forward(x, scale_D, epsilon, dtype, interpret):
  return _rms_norm(x, scale_D, epsilon, dtype, interpret), (x, scale_D)


def _rms_norm_backward(epsilon, dtype, interpret, saved, gradients):
  x, scale_D = saved

  def on_device(x, beside, gradient, scale_D):
    R, D = math.prod(x.shape[:3]), x.shape[-1]
    rows = _block_rows(D)
    programs = R // (rows * _ROUNDS)
    block = pl.BlockSpec((rows * _ROUNDS, D), lambda i: (i, 0))
    dx_RD, sums = pl.pallas_call(
      functools.partial(_norm_backward_kernel, epsilon=epsilon, rows=rows),
      grid=(programs,),
      in_specs=[block, block, block, pl.BlockSpec((D,), lambda i: (0,))],
      out_specs=[block, pl.BlockSpec((1, D), lambda i: (i, 0))],
      out_shape=[jax.ShapeDtypeStruct((R, D), x.dtype), jax.ShapeDtypeStruct((programs, D), jnp.float32)],
      compiler_params=compiler_params(),
      interpret=interpret,
      name="rms_norm_gradient",
    )(*(a.reshape(R, D) for a in (x, beside, gradient)), scale_D)
    return dx_RD.reshape(x.shape), sums

  spec = spec_of(x)
  dx, sums = on_mesh(on_device, (spec, spec, spec, P()), (spec, P(ROWS)))(x, *gradients, scale_D)
  return dx, jnp.sum(sums, axis=0)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _block_rows(width: int) -> int:
  """Rows of a block: a power of two."""
  return min(_MOST_ROWS, max(1, _NUMBERS >> (width - 1).bit_length()))


def _pieces(width: int) -> list[Any]:
  """Slices of a row whose lengths are powers of two: Triton has no others."""
  slices, first = [], 0
  while first < width:
    length = min(_NUMBERS, 1 << ((width - first).bit_length() - 1))
    slices.append(pl.ds(first, length))
    first += length
  return slices


def _sum_of_rows(pieces: Sequence[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, [jnp.sum(piece, axis=1) for piece in pieces])[:, None]


def _inverse_deviation(pieces: Sequence[jax.Array], width: int, epsilon: float) -> jax.Array:
  return jax.lax.rsqrt(_sum_of_rows([a * a for a in pieces]) / width + epsilon)


def _norm_kernel(x_ref, scale_ref, y_ref, *, epsilon):
  rows, D = y_ref.shape
  pieces = _pieces(D)
  x = [x_ref[:, piece].astype(jnp.float32) for piece in pieces]
  root = _inverse_deviation(x, D, epsilon)
  for piece, a in zip(pieces, x, strict=True):
    y_ref[:, piece] = (a * (root * scale_ref[piece][None])).astype(y_ref.dtype)


def _norm_backward_kernel(x_ref, beside_ref, gradient_ref, scale_ref, dx_ref, sums_ref, *, epsilon, rows):
  D = dx_ref.shape[-1]
  pieces = _pieces(D)
  scale = [scale_ref[piece][None] for piece in pieces]

  def block(i, sums):
    at = pl.ds(i * rows, rows)
    x = [x_ref[at, piece].astype(jnp.float32) for piece in pieces]
    dy = [gradient_ref[at, piece].astype(jnp.float32) for piece in pieces]
    root = _inverse_deviation(x, D, epsilon)
    dot = _sum_of_rows([g * s * a for g, s, a in zip(dy, scale, x, strict=True)])
    shrink = root * root * root * dot / D
    for piece, a, g, s in zip(pieces, x, dy, scale, strict=True):
      dx = beside_ref[at, piece].astype(jnp.float32) + g * s * root - a * shrink
      dx_ref[at, piece] = dx.astype(dx_ref.dtype)
    return tuple(total + g * a * root for total, g, a in zip(sums, dy, x, strict=True))

  nothing = tuple(jnp.zeros((rows, piece.size), jnp.float32) for piece in pieces)
  for piece, total in zip(pieces, jax.lax.fori_loop(0, _ROUNDS, block, nothing), strict=True):
    sums_ref[0, piece] = jnp.sum(total, axis=0)  # once, after the loop: it synchronises a program's threads


# --- SwiGLU. ---


def swiglu_obstacle(hidden_BNM2F: Shaped) -> str:
  """Returns why `swiglu` cannot serve here, or ''."""
  if len(hidden_BNM2F.shape) != 5:
    return f"the array is {hidden_BNM2F.shape}"
  F = hidden_BNM2F.shape[-1] // mesh_axes().get("tensor", 1)
  if F % 8:
    return f"{F} hidden numbers of a device are not a multiple of 8"
  return obstacle(hidden_BNM2F, spec_of(hidden_BNM2F, None, "tensor"), _block_rows(F))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def swiglu(hidden_BNM2F: jax.Array, interpret: bool = False) -> jax.Array:
  """Computes silu(gate) * up of the gate and up, [B, N, M, F] (SwiGLU; Shazeer, 2020), with one kernel backward.

  Args:
    interpret: run the kernel step by step on any device (tests).
  """
  return jax.nn.silu(hidden_BNM2F[..., 0, :]) * hidden_BNM2F[..., 1, :]


def _swiglu_forward(hidden, interpret):
  return swiglu(hidden, interpret), hidden


def _swiglu_backward(interpret, hidden, gradient):
  def on_device(hidden, gradient):
    R, F = math.prod(hidden.shape[:3]), hidden.shape[-1]
    rows = _block_rows(F)
    both = pl.BlockSpec((rows, 2, F), lambda i: (i, 0, 0))
    dh_R2F = pl.pallas_call(
      _swiglu_backward_kernel,
      grid=(R // rows,),
      in_specs=[both, pl.BlockSpec((rows, F), lambda i: (i, 0))],
      out_specs=both,
      out_shape=jax.ShapeDtypeStruct((R, 2, F), hidden.dtype),
      compiler_params=compiler_params(),
      interpret=interpret,
      name="swiglu_gradient",
    )(hidden.reshape(R, 2, F), gradient.reshape(R, F))
    return dh_R2F.reshape(hidden.shape)

  specs = spec_of(hidden, None, "tensor"), spec_of(hidden, "tensor")
  return (on_mesh(on_device, specs, specs[0])(hidden, gradient),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _swiglu_backward_kernel(hidden_ref, gradient_ref, dh_ref):
  for at in _pieces(gradient_ref.shape[-1]):
    parts = hidden_ref[:, 0, at], hidden_ref[:, 1, at], gradient_ref[:, at]
    gate, up, gradient = (part.astype(jnp.float32) for part in parts)
    logistic = 1 / (1 + jnp.exp(-gate))
    dh_ref[:, 0, at] = (gradient * up * logistic * (1 + gate * (1 - logistic))).astype(dh_ref.dtype)
    dh_ref[:, 1, at] = (gradient * gate * logistic).astype(dh_ref.dtype)
