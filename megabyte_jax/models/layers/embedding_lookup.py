"""Looks bytes up in a table, with a deterministic gradient that JAX differentiates forwards and backwards; and logits.

JAX's own gradient of a lookup is a scatter, whose sums devices take in any order. Here it is a product with one-hot
vectors, with float32 sums: fast and deterministic on every device. `jax.custom_vjp` would say so, too, but forbids
forward mode (Jacobian-vector and Hessian-vector products); as the lookup is linear in the table, a primitive with its
own transpose serves both modes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from megabyte_jax.parallel.activation_layout import BATCH, lay_out, mesh_axes, refuse_explicit_axes

_ONE_HOT = 1 << 30  # numbers of one-hot vectors that may be in memory together: 2 GiB of bfloat16


def lookup(table_Vd: jax.Array, bytes_: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the rows of a float32 table [V, d] that the bytes [...] name, as `dtype` [..., d].

  Raises:
    ConfigError: the table is cut along Explicit axes of a mesh.
  """
  refuse_explicit_axes(table_Vd, "the model's parameters lie")
  if spread := _varying(bytes_) - _varying(table_Vd):  # within shard_map: devices have bytes of their own
    table_Vd = jax.lax.pcast(table_Vd, tuple(spread), to="varying")  # so that gradients are summed over them
  axes = mesh_axes()
  rows = bytes_.size // math.prod(axes.get(axis, 1) for axis in BATCH)  # that a device looks up
  if axes.get("fsdp", 1) > 1 and len(table_Vd) <= rows:
    # Each device gets the whole table, or XLA would exchange halves of the many rows. In a jit of its own, as an array
    # that lies on one device cannot be laid out otherwise.
    table_Vd = jax.jit(lay_out, static_argnums=1)(table_Vd, P())
  return _rows.bind(table_Vd, bytes_, dtype=jnp.dtype(dtype))


def _varying(x: jax.Array) -> frozenset[str]:
  """The axes of a mesh along which devices hold different values of x, within shard_map with `check_vma`."""
  kind = getattr(jax.typeof(x), "manual_axis_type", None)
  return frozenset(getattr(kind, "varying", ()))


def _take(table_Vd: jax.Array, bytes_: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
  return jnp.take(table_Vd, bytes_, axis=0).astype(dtype)


def _gradient(gradient: jax.Array, bytes_: jax.Array, vocab: int) -> jax.Array:
  """The transpose of `_take`: the sum, of each byte value, of the gradients [..., d] at its places; float32 [V, d]."""

  def product(bytes_, gradient):
    one_hot = jax.nn.one_hot(bytes_, vocab, dtype=gradient.dtype)
    return jnp.einsum("...V,...d->Vd", one_hot, gradient, preferred_element_type=jnp.float32)

  parts = 1
  if bytes_.size * vocab > _ONE_HOT:
    parts = math.gcd(bytes_.shape[-1], 1 << math.ceil(math.log2(bytes_.size * vocab / _ONE_HOT)))
  if parts == 1:
    return product(bytes_, gradient)

  # Byte l of a span goes to part l % parts, so that devices that share a sequence share every part.
  def split(a, axis):
    return jnp.moveaxis(a.reshape(*a.shape[:axis], -1, parts, *a.shape[axis + 1 :]), axis + 1, 0)

  axis = bytes_.ndim - 1
  zeros = jnp.zeros((vocab, gradient.shape[-1]), jnp.float32)
  inputs = split(bytes_, axis), split(gradient, axis)
  return jax.lax.scan(lambda total, part: (total + product(*part), None), zeros, inputs)[0]


_rows = Primitive("byte_lookup")
_rows.def_impl(jax.jit(_take, static_argnames="dtype"))
mlir.register_lowering(_rows, mlir.lower_fun(_take, multiple_results=False))


@_rows.def_abstract_eval
def _abstract(table_Vd: Any, bytes_: Any, *, dtype: jnp.dtype) -> Any:
  [out] = jax.make_jaxpr(lambda *a: _take(*a, dtype=dtype))(table_Vd, bytes_).out_avals
  return out


def _transpose(gradient: Any, table_Vd: Any, bytes_: jax.Array, *, dtype: jnp.dtype) -> list[Any]:
  if isinstance(gradient, ad.Zero):
    return [None, None]
  return [_gradient(gradient, bytes_, table_Vd.aval.shape[0]), None]


def _batch(arguments: tuple[Any, Any], dims: tuple[Any, Any], *, dtype: jnp.dtype) -> tuple[jax.Array, int]:
  (table, bytes_), (table_dim, bytes_dim) = arguments, dims
  if bytes_dim is not None:
    bytes_ = jnp.moveaxis(bytes_, bytes_dim, 0)
  if table_dim is None:
    return lookup(table, bytes_, dtype), 0
  table = jnp.moveaxis(table, table_dim, 0)  # several tables become one
  N, V, d = table.shape
  if bytes_dim is None:
    bytes_ = jnp.broadcast_to(bytes_, (N, *bytes_.shape))
  first = V * jnp.arange(N).reshape(N, *(1 for _ in bytes_.shape[1:]))
  return lookup(table.reshape(N * V, d), first + bytes_, dtype), 0


ad.defjvp(_rows, lambda table_Vd, _, bytes_, dtype: lookup(table_Vd, bytes_, dtype), None)
ad.primitive_transposes[_rows] = _transpose
batching.primitive_batchers[_rows] = _batch


def logits_of(h: jax.Array, table_Vd: jax.Array, scale: float) -> jax.Array:
  """Computes h [..., d], scaled, times each row of the table; float32 [..., V]."""
  return product_with_table(h * scale if scale != 1.0 else h, table_Vd)


@jax.custom_jvp
def product_with_table(h: jax.Array, table_Vd: jax.Array) -> jax.Array:
  """Computes h [..., d] times each row of the table, float32 [..., V]; its gradients are products in h's dtype.

  JAX's own would convert h and the table to float32 first, as the logits are.
  """
  return jnp.einsum("...d,Vd->...V", h, table_Vd, preferred_element_type=jnp.float32)


@product_with_table.defjvp
def _product_with_table_jvp(primals, tangents):
  (h, table_Vd), (dh, dtable_Vd) = primals, tangents
  change = jnp.einsum("...d,Vd->...V", dh, table_Vd) + jnp.einsum("...d,Vd->...V", h, dtable_Vd)
  return product_with_table(h, table_Vd), change.astype(jnp.float32)
