"""Holds weight matrices in 8 bits for decoding, which reads all of them for every byte and computes little with each.

A matrix becomes integers and a scale for each of its outputs, so that x @ W is (x @ integers) * scale. Integers up to
127 are exact in bfloat16, and no matrix of scaled weights is made. Embeddings, an output of its
own, convolutions, biases and norms stay.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.errors import require

WEIGHTS = ("", "int8")  # names of formats; '' is the compute dtype
LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
  """A matrix in 8 bits, as the value of a parameter.

  Attributes:
    values: int8, of the matrix's shape: inputs first, then outputs; of stacked layers these come before both.
    scale: float32, of the outputs (and layers): the matrix is values * scale.
  """

  values: jax.Array
  scale: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the matrix."""
    return self.values.shape

  @property
  def num_inputs(self) -> int:
    """Number of input axes, of a matrix without an axis of layers."""
    return self.values.ndim - self.scale.ndim

  def astype(self, dtype: jnp.dtype) -> jax.Array:
    """Returns the matrix itself, made for whoever asks."""
    return (self.values * self.scale).astype(dtype)

  def product(self, x: jax.Array) -> jax.Array:
    """Computes x [..., inputs] @ matrix, [..., outputs], in x's dtype with float32 sums."""
    inputs = tuple(range(self.num_inputs))
    x, values = beside(x, self.values)
    axes = (tuple(x.ndim - len(inputs) + i for i in inputs), inputs)
    y = jax.lax.dot_general(x, values.astype(x.dtype), (axes, ((), ())), preferred_element_type=jnp.float32)
    return (y * self.scale).astype(x.dtype)


def product(x: jax.Array, matrix: nnx.Param) -> jax.Array:
  """Computes x [..., inputs] @ matrix [inputs, outputs] in x's dtype, of a matrix of floats or a `Quantised` one."""
  value = matrix.get_value()
  return value.product(x) if isinstance(value, Quantised) else x @ value.astype(x.dtype)


def beside(x: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns both as they are, but the integers only where x is known.

  In a loop over bytes XLA would otherwise convert all integers once, before it, and read twice as much in every round.
  """
  return jax.lax.optimization_barrier((x, values))


def quantise(matrix: jax.Array, inputs: tuple[int, ...]) -> Quantised:
  """Returns a matrix in 8 bits: symmetric, one scale for each output, so that its largest weight becomes 127.

  Args:
    matrix: float32; of stacked layers, too.
    inputs: its axes that a product sums over.
  """
  largest = jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=inputs, keepdims=True)
  scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
  values = jnp.clip(jnp.round(matrix / scale), -LARGEST, LARGEST).astype(jnp.int8)
  return Quantised(values, jnp.squeeze(scale, axis=inputs))


class Linear(nnx.LinearGeneral):
  """A matrix product over the last axes, of a kernel of floats or a `Quantised` one."""

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Returns inputs @ kernel + bias in the module's dtype."""
    kernel = self.kernel.get_value()
    if not isinstance(kernel, Quantised):
      return super().__call__(inputs, out_sharding)
    y = kernel.product(inputs.astype(self.dtype))
    return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def is_quantised(parameters: Any) -> bool:
  """Returns whether any parameter of a model's state or nested dicts is in 8 bits."""
  leaves = jax.tree.leaves(parameters, is_leaf=lambda node: isinstance(node, Quantised))
  return any(isinstance(leaf, Quantised) for leaf in leaves)


def require_floats(parameters: Any, what: str) -> None:
  """Raises ConfigError where weights are in 8 bits, which `what` does not take."""
  require(
    not is_quantised(parameters),
    f"{what} takes the weights as they were trained, and these are in 8 bits; load the model again",
  )


def check_weights(name: str) -> None:
  """Raises ConfigError for a format of weights that is not known."""
  require(name in WEIGHTS, f"weights={name!r} is not a format of weights; take int8, or '' for the compute dtype")
