"""What the device can do at most, measured: matrix products under sustained load, and copies."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp


def matmul_flops(seconds: float = 4.0, size: int = 8192) -> float:
  """FLOP/s of square bfloat16 matrix products, sustained: the second half of `seconds`, after clocks have settled."""
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16) / size**0.5

  @jax.jit
  def products(x):
    return jax.lax.fori_loop(0, 10, lambda _, x: x @ a, x)

  def run(seconds: float) -> float:
    begin, count, x = time.perf_counter(), 0, a
    while time.perf_counter() - begin < seconds:
      x = products(x).block_until_ready()
      count += 10
    return count * 2 * size**3 / (time.perf_counter() - begin)

  products(a).block_until_ready()
  run(seconds / 2)
  return run(seconds / 2)


def copy_bandwidth(size: int = 1 << 30) -> float:
  """Bytes a second, read and written, of the best of several copies of `size` bytes."""
  x = jnp.zeros(size // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  copy(x).block_until_ready()
  best = float("inf")
  for _ in range(10):
    start = time.perf_counter()
    copy(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size / best
