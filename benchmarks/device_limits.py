"""What the device can do at most, measured: matrix products under sustained load, and copies."""

from __future__ import annotations

import functools
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
  """Bytes a second, read and written, of an array of `size` bytes; many copies in one program, best of three."""
  times = 30

  @functools.partial(jax.jit, donate_argnums=0)
  def copies(x, times):  # their number is an argument, so that they are not merged into one
    return jax.lax.fori_loop(0, times, lambda _, x: x + 1, x)

  def run(x) -> tuple[float, jax.Array]:
    begin = time.perf_counter()
    x = copies(x, times).block_until_ready()
    return time.perf_counter() - begin, x

  seconds, x = [], run(jnp.zeros(size // 4, jnp.float32))[1]
  for _ in range(3):
    taken, x = run(x)
    seconds.append(taken)
  return 2 * size * times / min(seconds)
