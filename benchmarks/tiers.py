"""The models that are compared at equal operations, and what a device allows a step of theirs.

A tier is a number of training operations, counted as SpaceByte does; each of its models has the modern recipe of
configs/recipe.py, with 262,144 bytes a step. Narrow products do not reach the rate of wide ones, on any device: here
each is timed at its own size, forward and for both gradients.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from device_limits import traffic_of_step

from megabyte_jax.config import Config, overrides
from megabyte_jax.config.counts import attention_width, from_above
from megabyte_jax.models import flops

TIERS = {  # names of configs/recipe.py; docs/results.md has further sizes at 1e17, and at 1e18 none has been trained
  "3e16": {
    "megabyte8": "megabyte:8:512x6:256x6",
    "megabyte4": "megabyte:4:512x6:256x6",
    "transformer": "transformer:320x6",
    "windowed": "windowed:384x5",
    "perceiver_ar": "perceiver:384x5",
  },
  "1e17": {
    "megabyte8": "megabyte:8:768x8:384x8",
    "megabyte4": "megabyte:4:768x6:384x6",
    "transformer": "transformer:512x6",
    "windowed": "windowed:512x6",
    "perceiver_ar": "perceiver:512x6",
  },
  "1e18": {
    "megabyte8": "megabyte:8:768x12:384x12",
    "megabyte4": "megabyte:4:768x12:384x12",
    "transformer": "transformer:640x8",
    "windowed": "windowed:640x8",
    "perceiver_ar": "perceiver:640x8",
  },
}
CASES = {f"{tier}_{name}": row for tier, rows in TIERS.items() for name, row in rows.items()}
KNOWN = CASES | {"tiny_tier": "transformer:64x1"}  # which serves tests on a CPU


def tier_config(case: str) -> Config:
  """Returns the config of a case such as 1e17_megabyte8; its rate is small, as the bytes that are timed are random."""
  file = pathlib.Path(__file__).parents[1] / "configs" / "recipe.py"
  config = Config.from_dict(overrides.load("case", f"{file}:{KNOWN[case]}+modern", []))
  optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-4)
  return dataclasses.replace(config, optimizer=optimizer, num_steps=1_000_000)


class Product(NamedTuple):
  """A product of activations [rows, inputs] with weights [inputs, outputs]; its gradients are two more."""

  rows: int
  inputs: int
  outputs: int


def products_of_step(config: Config) -> collections.Counter[Product]:
  """Returns how often a training step does each product of activations with weights.

  Those of attention, of activations with each other, are none of them.
  """
  model, parts = config.model, config.accumulate
  batch = config.batch_size // parts
  found: collections.Counter[Product] = collections.Counter()

  def block(level, rows, queries, times):
    heads, hidden = attention_width(level), model.hidden(level)
    found[Product(rows, level.width, heads)] += 2 * times  # keys and values
    found[Product(queries, level.width, heads)] += times
    found[Product(queries, heads, level.width)] += times
    found[Product(queries, level.width, (1 + model.gated) * hidden)] += times
    found[Product(queries, hidden, level.width)] += times

  above = None
  for level, slots in zip(model.levels, model.slots, strict=True):
    rows = batch * int(slots)
    block(level, rows, rows, level.num_layers * parts)
    if weights := from_above(level, above):
      found[Product(rows, weights // level.width, level.width)] += parts
    above = level
  if cross := model.cross_attention:
    block(model.levels[0], batch * model.context, batch * cross.queries, parts)
  last = model.levels[-1]
  found[Product(batch * model.predicted_bytes, last.byte_width, model.vocab_size)] += parts
  return found


def product_seconds(product: Product, seconds: float = 0.1) -> float:
  """Times a product and both of its gradients in bfloat16, the second half of `seconds`."""
  rows, inputs, outputs = product
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (rows, inputs), (inputs, outputs), (rows, outputs)
  x, w, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))

  @jax.jit
  def three(x, w, dy):
    return x @ w, dy @ w.T, x.T @ dy

  def run(times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
      made = three(x, w, dy)
    jax.block_until_ready(made)
    return (time.perf_counter() - begin) / times

  run(1)
  times = max(1, round(seconds / 2 / run(3)))
  run(times)
  return run(times)


def least_seconds_by_width(config: Config, ceiling: float, bandwidth: float, seconds: float = 0.1) -> float:
  """Computes the roofline of a training step with its products at the rate that they have at their own sizes.

  Those of attention run at the ceiling; the rest is memory traffic, as in `device_limits.least_seconds`.
  """
  products = products_of_step(config)
  weights = sum(times * product_seconds(product, seconds) for product, times in products.items())
  step = flops.flops_per_byte(config.model, training=True) * config.bytes_per_step
  attention = step - operations(products)
  return weights + attention / ceiling + traffic_of_step(config) / bandwidth


def operations(products: collections.Counter[Product]) -> int:
  """Counts the operations of products and their gradients."""
  return sum(times * 6 * product.rows * product.inputs * product.outputs for product, times in products.items())
