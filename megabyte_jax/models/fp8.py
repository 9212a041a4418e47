"""Matrix products of training in eight bits: operands float8_e4m3fn, gradients float8_e5m2, sums float32.

Each operand is divided by a power of two, the least that brings its largest magnitude into the format's range. This
is current scaling: nothing is kept from step to step, and the scale of an array that is spread over devices is that of
the whole. Powers of two make scaling itself exact, so that the only error is that of rounding to 3 (e4m3) or 2 (e5m2)
bits of mantissa. What XLA sees are products of scaled float8 arrays: cuBLAS takes them as they are on GPUs that can
(compute capability 8.9 and later), other devices compute them in the compute dtype.

What others offer does not fit: flax's fp8 products keep histories of maxima as further parameters, and
jax.nn.scaled_dot_general has a scale for each block of 16 or 32 numbers, which GPUs before Blackwell cannot do.

A scale is that of a whole array and so depends on later bytes, if hardly. A probability must not: hence this is for
training alone, see `abstract_model`.

Shapes: X the axes that a row has, C the axes that are summed over, F the axes of the result (any number of each).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

_FORWARD, _BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_LEAST, _MOST = 2.0**-100, 2.0**100  # of a scale: neither it nor its inverse may leave float32


def quantise(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
  """x / scale in the float8 `dtype`, and the scale, a power of two (float32, no axes). Values not finite become NaN."""
  largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
  _, exponent = jnp.frexp(jnp.clip(largest / float(jnp.finfo(dtype).max), _LEAST, _MOST))
  scale = checkpoint_name(jnp.ldexp(jnp.float32(1), exponent), "scale")  # kept, it saves backward a pass over x
  return (x.astype(jnp.float32) * (1 / scale)).astype(dtype), scale


def _widened(quantised: tuple[jax.Array, jax.Array], dtype: jnp.dtype) -> jax.Array:
  """The array that was quantised, rounded as it was; XLA for GPUs looks for these very operations before a product."""
  x, scale = quantised
  return x.astype(dtype) * scale.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_XC: jax.Array, w_CF: jax.Array, axes: int = 1) -> jax.Array:
  """The sum over the last `axes` axes of x and the first of w, in x's dtype [X, F]."""
  return _product_fwd(x_XC, w_CF, axes)[0]


def _product_fwd(x_XC, w_CF, axes):
  x, w = quantise(x_XC, _FORWARD), quantise(w_CF, _FORWARD)
  rows = x_XC.ndim - axes
  summed = (tuple(range(rows, x_XC.ndim)), tuple(range(axes)))
  y_XF = jax.lax.dot_general(_widened(x, x_XC.dtype), _widened(w, x_XC.dtype), (summed, ((), ())))
  return y_XF, (x, w, jnp.zeros((), w_CF.dtype))


def _product_bwd(axes, kept, dy_XF):
  x, w, like_w = kept
  dtype = dy_XF.dtype
  dy = _widened(quantise(dy_XF, _BACKWARD), dtype)
  rows = x[0].ndim - axes
  features = (tuple(range(rows, dy_XF.ndim)), tuple(range(axes, w[0].ndim)))
  # HIGHEST: cuBLAS then adds up in float32; its fast sums of fewer bits suffice forward, where TransformerEngine has
  # them, too.
  dot = functools.partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)
  dx_XC = dot(dy, _widened(w, dtype), (features, ((), ())))
  over_rows = (tuple(range(rows)), tuple(range(rows)))
  dw_CF = dot(_widened(x, dtype), dy, (over_rows, ((), ())))
  return dx_XC, dw_CF.astype(like_w.dtype)


product.defvjp(_product_fwd, _product_bwd)


def dot_general(x_XC: jax.Array, w_CF: jax.Array, dimension_numbers, **_) -> jax.Array:
  """`product` as nnx.LinearGeneral calls it: the last axes of x with the first of w, no batch axes."""
  (axes_x, axes_w), batch = dimension_numbers
  n = len(axes_x)
  last, first = tuple(range(x_XC.ndim - n, x_XC.ndim)), tuple(range(n))
  if (tuple(axes_x), tuple(axes_w)) != (last, first) or any(batch):
    raise ValueError(f"fp8 products are over the last axes of x and the first of w, not {dimension_numbers}")
  return product(x_XC, w_CF, n)
