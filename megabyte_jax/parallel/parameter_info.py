"""Keeps what a parameter declares about itself where it is made, and finds it again for arrays in nested dicts.

A parameter is made by models/parameters.py, with a `ParameterInfo` as its metadata. `models.build.parameter_info`
collects those of a model by name. Partition specs, Muon's matrices, casts and memory layouts are all derived from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import nnx

Kind = Literal["table", "positions", "pad", "matrix", "output", "convolution", "bias", "offset", "norm"]

EMBEDDINGS: tuple[Kind, ...] = ("table", "positions", "pad")

# Axes along which a parameter holds matrices of their own: layers; queries, keys and values; a gated layer's halves.
COUNTING_AXES = ("layers", "projections", "halves")


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
  """Describes one parameter.

  Attributes:
    kind: table (of bytes or tokens, also the tied output) | positions | pad | matrix | output (one that is not tied) |
      convolution | bias | offset (a vector that is added, but drawn like a matrix) | norm (its scale or shift).
    axes: logical name of every axis; sharding.py maps these names to axes of the mesh.
    inputs: those of the axes that are summed over in the product; empty where the parameter is looked up or added.
    fan_in: the number of inputs of one output, 1 without `inputs`.
    level: index in `config.levels` of the level that it belongs to.
  """

  kind: Kind
  axes: tuple[str, ...]
  inputs: tuple[str, ...] = ()
  fan_in: int = 1
  level: int = 0

  @property
  def input_places(self) -> tuple[int, ...]:
    """Indices of the input axes."""
    return tuple(i for i, axis in enumerate(self.axes) if axis in self.inputs)

  @property
  def output_places(self) -> tuple[int, ...]:
    """Indices of the output axes: neither inputs nor `COUNTING_AXES`."""
    return tuple(i for i, axis in enumerate(self.axes) if axis not in (*self.inputs, *COUNTING_AXES))


ParameterInfos = Mapping[str, ParameterInfo]  # by parameter_name


def parameter_name(path: jax.tree_util.KeyPath) -> str:
  """Returns `levels.0.decoder.blocks.qkv.kernel` for a path that `jax.tree_util` gives."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def is_variable(node: Any) -> bool:
  """Returns whether a node of a model's state is a whole parameter, be it a tuple of arrays."""
  return isinstance(node, nnx.Variable)


def map_with_info(function: Callable[[Any, ParameterInfo | None], Any], tree: Any, infos: ParameterInfos) -> Any:
  """Maps `function(leaf, info)` over a tree of parameters, or of what is named like them, such as optimizer moments.

  Args:
    tree: arrays or shapes in nested containers, whose paths end in parameters' names; or a state of nnx variables.
    infos: of the model's parameters.

  Returns:
    The mapped tree. What belongs to no parameter, such as an optimizer's counts and constants, has an info of None.
  """

  def with_info(path, leaf):
    parts = parameter_name(path).split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return function(leaf, next((infos[end] for end in ends if end in infos), None))

  return jax.tree_util.tree_map_with_path(with_info, tree, is_leaf=is_variable)
