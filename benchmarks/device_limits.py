"""Measures the limits of the device (matrix products under sustained load, copies) and bounds a step by them."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from megabyte_jax.config import Config, Level, ModelConfig
from megabyte_jax.models import flops


def matmul_flops(seconds: float = 4.0, size: int = 8192) -> float:
  """Measures FLOP/s of square bfloat16 products, sustained: the second half of `seconds`, after clocks have settled."""
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
  """Measures bytes a second, read and written, of copies of `size` bytes: many in one program, best of three."""
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


def least_seconds(config: Config, ceiling: float, bandwidth: float) -> float:
  """Computes the roofline of a training step on one device: its products at `ceiling`, then its other traffic."""
  model = config.model
  products = flops.flops_per_byte(model, training=True) * config.bytes_per_step
  return products / ceiling + traffic_of_step(config) / bandwidth


def traffic_of_step(config: Config) -> float:
  """Counts the bytes that a training step moves beside its products.

  They are what cannot be fused into products: of each block the norms and the attention, forward and backward,
  and the derivative of the activation; the logits; the optimizer and the casts of the weights. Residuals, biases and
  the activation itself cost nothing here, nor does anything that is computed again.
  """
  model = config.model
  parameters = model.parameter_count()
  stacks = zip(model.levels, model.slots, strict=True)
  blocks = sum(_block_traffic(model, level) * slots for level, slots in stacks)
  if cross := model.cross_attention:
    blocks += 3 * 4 * 2 * cross.width * model.context  # norm and attention of the prefix, and their gradients
  predicted = model.predicted_bytes
  traffic = config.batch_size * (blocks + 3 * 4 * model.vocab_size * predicted)  # logits: float32, three times
  # Value, gradient and moments read and written in float32; read, written in bfloat16.
  traffic += parameters * (8 * (2 + config.optimizer.moments) + 6)
  return traffic


def _block_traffic(model: ModelConfig, level: Level) -> int:
  """Bytes that the blocks of a level move for one slot: bfloat16 arrays of the level's or the hidden width."""
  forward = 2 * 2 + 4  # two norms; q, k, v and what is attended
  backward = 2 * 4 + 7  # of a norm: its input, two gradients added, one written; of attention: with three written
  # Of the activation: its result and two gradients; of a gated one, which is no epilogue, two inputs more, and so on.
  hidden = 8 if model.gated else 3
  return level.num_layers * 2 * ((forward + backward) * level.width + hidden * model.hidden(level))
