"""Drops activations, with random numbers that cost next to nothing."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of x and scales up the rest; does nothing without a key."""
  if key is None or rate == 0:
    return x
  kept = random_bits(key, x.shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws uniform uint32 numbers, each a hash of the key and its place alone: the same on every mesh.

  Good enough to drop activations, at a fraction of the instructions of JAX's generator: with these, random numbers
  would take longer than the memory traffic of the activations; so they hide behind it.
  """
  first, second = jax.random.bits(key, (2,), jnp.uint32)
  *rows, columns = shape

  def place(axis):  # not one iota, reshaped: over a mesh each device counts its own rows
    return jax.lax.broadcasted_iota(jnp.uint32, (*rows, 1), axis) * jnp.uint32(math.prod(rows[axis + 1 :]))

  row = sum((place(axis) for axis in range(len(rows))), jnp.uint32(0))
  row = _mix(_mix(row ^ first) + second)
  column = jax.lax.iota(jnp.uint32, columns) * jnp.uint32(0x9E3779B9)
  return _mix(row ^ column)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 in which every bit of the input flips every bit of the output half of the time."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
