"""Makes Muon's updates: momenta whose matrices are made orthogonal (Jordan, 2024; scaled as Liu et al., 2025, do).

Matrices of one shape, from all parameters, are stacked and go through the same products. On a mesh every device takes
its share of each stack, whichever axes the mesh has, rather than all devices the whole. On accelerators the operands of
the products are bfloat16, and so are x x^T and its polynomial; the matrices x stay float32.

Shapes: N matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from megabyte_jax.parallel.activation_layout import lay_out, mesh_axes
from megabyte_jax.parallel.backend import platform
from megabyte_jax.parallel.parameter_info import ParameterInfo, ParameterInfos, map_with_info

_RMS = 0.2  # of the updates, about AdamW's: one learning rate and weight decay serve both
_STEPS = 5
_COEFFICIENTS = 3.4445, -4.7750, 2.0315


class MuonState(NamedTuple):
  """Holds the number of updates made, int32, and the momenta, float32, of every matrix."""

  updates: jax.Array
  mu: Any


def scale_by_muon(beta: float, eps: float, infos: ParameterInfos) -> optax.GradientTransformation:
  """Makes updates of root mean square 0.2 from Nesterov momenta, without a learning rate.

  Args:
    beta: of the momentum.
    eps: added to the norm that a matrix is divided by.
    infos: what the matrices declare; each parameter may hold many (`COUNTING_AXES`).
  """

  def init(parameters):
    return MuonState(jnp.int32(0), optax.tree.zeros_like(parameters))

  def update(gradients, state, parameters=None):
    del parameters
    count = state.updates + 1
    mu = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.mu, gradients)
    # Both parts without the bias of a start at zero.
    ahead, now = beta / (1 - beta ** (count + 1)), (1 - beta) / (1 - beta**count)
    nesterov = jax.tree.map(lambda m, g: ahead * m + now * g, mu, gradients)
    return orthogonal(nesterov, infos, eps), MuonState(count, mu)

  return optax.GradientTransformation(init, update)


def orthogonal(tree: Any, infos: ParameterInfos, eps: float) -> Any:
  """Returns the tree with every matrix made orthogonal, of root mean square 0.2, float32.

  Args:
    tree: momenta of parameters that hold matrices, float32.
    infos: what the parameters declare.
    eps: added to the norm that a matrix is divided by.
  """
  stacks: dict[tuple[int, int], list[jax.Array]] = {}

  def put(leaf, info):
    """Adds the leaf's matrices to the stack of their shape; returns where they are found there."""
    matrices = Matrices.of(leaf.shape, info)
    stack = stacks.setdefault(matrices.shape, [])
    first = sum(part.shape[0] for part in stack)
    stack.append(matrices.stacked(leaf, eps))
    return matrices, first

  places = map_with_info(put, tree, infos)
  made = {shape: newton_schulz(jnp.concatenate(parts)) for shape, parts in stacks.items()}

  def take(leaf, place):
    matrices, first = place
    return matrices.unstacked(made[matrices.shape][first : first + matrices.number], leaf.shape)

  return jax.tree.map(take, tree, places)


class Matrices(NamedTuple):
  """Says how a parameter's matrices are stacked.

  Attributes:
    counting, inputs, outputs: the parameter's axes that count matrices, and those of one matrix.
    number: of matrices.
    rows, columns: sizes of one, inputs and outputs.
  """

  counting: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  number: int
  rows: int
  columns: int

  @classmethod
  def of(cls, shape: tuple[int, ...], info: ParameterInfo) -> Matrices:
    """Returns how the matrices of a parameter of this shape are stacked."""
    inputs, outputs = info.input_places, info.output_places
    counting = tuple(i for i in range(len(shape)) if i not in inputs + outputs)
    sizes = (math.prod(shape[i] for i in places) for places in (counting, inputs, outputs))
    return cls(counting, inputs, outputs, *sizes)

  @property
  def order(self) -> tuple[int, ...]:
    """Returns the parameter's axes as they are taken together."""
    return self.counting + self.inputs + self.outputs

  @property
  def shape(self) -> tuple[int, int]:
    """The shape of one in the stack, where none is higher than wide."""
    return min(self.rows, self.columns), max(self.rows, self.columns)

  def stacked(self, leaf: jax.Array, eps: float) -> jax.Array:
    """Returns the matrices [number, *shape], divided by their norms."""
    norm = jnp.sqrt(jnp.sum(jnp.square(leaf), axis=self.inputs + self.outputs, keepdims=True))
    x_NRC = (leaf / (norm + eps)).transpose(self.order).reshape(self.number, self.rows, self.columns)
    return x_NRC.mT if self.rows > self.columns else x_NRC

  def unstacked(self, x_NRC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the parameter of this shape whose matrices x are, of root mean square 0.2."""
    x_NRC = x_NRC.mT if self.rows > self.columns else x_NRC
    x = x_NRC.reshape([shape[i] for i in self.order]).transpose([self.order.index(i) for i in range(len(shape))])
    return x.astype(jnp.float32) * (_RMS * max(self.shape) ** 0.5)


def newton_schulz(x_NRC: jax.Array) -> jax.Array:
  """Returns matrices with the singular vectors of x and singular values near 1, each device working on some of them.

  Args:
    x_NRC: float32, of norm 1 at most, none higher than wide.
  """
  count, devices = x_NRC.shape[0], math.prod(mesh_axes().values())
  spread = P(tuple(mesh_axes()) or None)
  x_NRC = lay_out(jnp.pad(x_NRC, ((0, -count % devices), (0, 0), (0, 0))), spread)
  dtype = product_dtype()
  a, b, c = _COEFFICIENTS
  # A step is a (x + b/a S x + c/a S^2 x), S = x x^T. The factor a is left to the end, since XLA makes a sum part of
  # cuBLAS's product only where what is added has no factor. S is scaled so that the factor of S^2 is a power of two,
  # exact in bfloat16, and another one in each step: XLA does not make a constant that is used twice part of a product.
  scale = 1.0  # what x lacks
  for step in range(_STEPS):
    fraction = -(2.0 ** -(step + 1))
    unit = c / b / fraction
    y_NRC = (scale * unit**0.5 * x_NRC).astype(dtype)
    squares_NRR = jnp.matmul(y_NRC, y_NRC.mT)
    sums_NRR = squares_NRR + fraction * jnp.matmul(squares_NRR, squares_NRR)
    product_NRC = jnp.matmul(sums_NRR, y_NRC, preferred_element_type=jnp.float32)
    x_NRC += b / (a * unit**1.5 * scale) * product_NRC
    scale *= a
  return lay_out((scale * x_NRC).astype(dtype), spread)[:count]  # what other devices get need not be float32, either


def product_dtype() -> jnp.dtype:
  """Returns the type of the products' operands."""
  return jnp.dtype(jnp.float32 if platform() == "cpu" else jnp.bfloat16)
