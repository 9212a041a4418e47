"""Makes parameters: draws their initial values and attaches what they declare of themselves (`ParameterInfo`).

Every parameter of every model comes from here, directly or in a layer of `make_linear` or `make_norm`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from megabyte_jax.config import BlockOptions, Level
from megabyte_jax.models.layers.quantised import Linear
from megabyte_jax.parallel.parameter_info import EMBEDDINGS, Kind, ParameterInfo

Sizes = Mapping[str, int]  # logical axis -> its size, in the order of the array's axes


class Keys:
  """Gives each parameter a random key of its own: the same keys as `nnx.Rngs(key)`.

  That counts its keys in an array, which takes longer to trace than all of a model's parameters; this counts in Python,
  and makes several keys by one computation, which is compiled once. Without a key every parameter is zeros or ones: for
  shapes.
  """

  _AT_ONCE = 16

  def __init__(self, key: jax.Array | None, first: int | jax.Array = 0):
    self.key, self.first, self.given = key, first, 0

  def params(self) -> jax.Array | None:
    """Returns the next key."""
    place = self.given % self._AT_ONCE
    self.given += 1
    if self.key is None:
      return None
    if place == 0:
      numbers = self.first + self.given - 1 + np.arange(self._AT_ONCE)
      self._next = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self.key, numbers)
    return self._next[place]


def as_rngs(keys: Keys) -> nnx.Rngs:
  """Returns the keys for layers of Flax, which ask their `rngs` for nothing but `params()`."""
  return cast(nnx.Rngs, keys)


def compute_dtype(options: BlockOptions) -> jnp.dtype:
  """Returns the dtype of activations; `auto` is float32 on CPU and bfloat16 elsewhere."""
  if options.compute_dtype == "auto":
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
  return jnp.dtype(options.compute_dtype)


def initial_values(options: BlockOptions, info: ParameterInfo, *, scale: float = 1.0, balanced: bool = False) -> Any:
  """Returns the initializer (key, shape, dtype) -> values of a parameter.

  Appendix A.1: normal with deviation `init_std`, cut at two deviations; biases are 0. Matrices and convolutions may
  have `fan_in`^-1/2 instead (`BlockOptions.init`), and embeddings a deviation of their own; these normals are not cut.

  Args:
    scale: times the deviation of the paper.
    balanced: divides that by the root of `info.fan_in`.
  """
  if info.kind == "bias":
    return nnx.initializers.zeros
  if info.kind in EMBEDDINGS and options.embedding_std:
    return _or_zeros(nnx.initializers.normal(options.embedding_std))
  if options.init == "fan_in" and info.inputs:
    return _or_zeros(nnx.initializers.normal(info.fan_in**-0.5))
  if info.kind in EMBEDDINGS:
    deviation = options.init_std
  else:
    deviation = options.init_std * scale * (info.fan_in**-0.5 if balanced else 1.0)
  return _or_zeros(nnx.initializers.truncated_normal(stddev=deviation, lower=-2.0, upper=2.0))


def _or_zeros(draw: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Returns an initializer that draws nothing without a key."""
  return lambda key, shape, dtype: jnp.zeros(shape, dtype) if key is None else draw(key, shape, dtype)


def make_parameter(
  kind: Kind,
  sizes: Sizes,
  options: BlockOptions,
  rngs: nnx.Rngs,
  *,
  inputs: tuple[str, ...] = (),
  balanced: bool = False,
  deviation: float | None = None,
) -> nnx.Param:
  """Makes a float32 parameter; `inputs` and `balanced` as in `ParameterInfo` and `initial_values`.

  Args:
    deviation: draws from a whole normal of this deviation instead, where a paper says so.
  """
  info = ParameterInfo(kind, tuple(sizes), inputs, math.prod(sizes[axis] for axis in inputs))
  draw, shape = initial_values(options, info, balanced=balanced), tuple(sizes.values())
  if deviation is not None:
    draw = _or_zeros(nnx.initializers.normal(deviation))
  is_drawn = kind != "bias" or deviation is not None
  values = draw(rngs.params(), shape, jnp.float32) if is_drawn else jnp.zeros(shape, jnp.float32)
  return nnx.Param(values, info=info)


def make_output(vocab_size: int, width: int, options: BlockOptions, rngs: nnx.Rngs) -> nnx.Param | None:
  """Makes the output's own matrix, [V, d], or None where the output is the byte table (`tied_output`)."""
  if options.tied_output:
    return None
  sizes = {"vocab": vocab_size, "byte_width": width}
  return make_parameter("output", sizes, options, rngs, inputs=("byte_width",))


def make_scale(sizes: Sizes) -> nnx.Param:
  """Makes a float32 factor that is learned and begins at 1; no norm has it, but it is treated like one's scale."""
  return nnx.Param(jnp.ones(tuple(sizes.values()), jnp.float32), info=ParameterInfo("norm", tuple(sizes)))


def make_linear(
  sizes_in: Sizes, sizes_out: Sizes, options: BlockOptions, rngs: nnx.Rngs, *, scale: float = 1.0
) -> Linear:
  """Makes a matrix product over the last axes; `scale` shrinks the paper's initial weights."""
  info = ParameterInfo("matrix", (*sizes_in, *sizes_out), tuple(sizes_in), math.prod(sizes_in.values()))
  added = ParameterInfo("bias", tuple("channels" if axis == "width" else axis for axis in sizes_out))
  return Linear(
    tuple(sizes_in.values()),
    tuple(sizes_out.values()),
    axis=tuple(range(-len(sizes_in), 0)),
    use_bias=options.bias,
    kernel_init=initial_values(options, info, scale=scale),
    kernel_metadata={"info": info},
    bias_metadata={"info": added},
    dtype=compute_dtype(options),
    rngs=rngs,
  )


def make_norm(width: int, options: BlockOptions, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
  """Makes LayerNorm or RMSNorm over a width; statistics in float32, result in the compute dtype."""
  if options.norm == "rmsnorm":
    return _rms_norm(width, "channels", options, rngs)
  metadata = {"info": ParameterInfo("norm", ("channels",))}
  return nnx.LayerNorm(
    width,
    epsilon=1e-5,
    use_bias=options.bias,
    dtype=compute_dtype(options),
    scale_metadata=metadata,
    bias_metadata=metadata,
    rngs=rngs,
  )


def make_head_norm(level: Level, options: BlockOptions, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """Makes RMSNorm over a head's width (`qk_norm`); one scale for all heads."""
  return _rms_norm(level.heads[1], "head_dim", options, rngs)


def _rms_norm(width: int, axis: str, options: BlockOptions, rngs: nnx.Rngs) -> nnx.RMSNorm:
  metadata = {"info": ParameterInfo("norm", (axis,))}
  return nnx.RMSNorm(width, epsilon=1e-5, dtype=compute_dtype(options), scale_metadata=metadata, rngs=rngs)


def make_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
  """Makes `count` layers as one module, whose parameters have a first axis of layers and declare it."""
  key = rngs.params()
  keys = np.zeros(count) if key is None else jax.random.split(key, count)
  layers = nnx.vmap(lambda layer: make(as_rngs(Keys(None if key is None else layer))))(keys)
  _change(layers, lambda info: dataclasses.replace(info, axes=("layers", *info.axes)))
  return layers


def of_level(module: nnx.Module, level: int) -> None:
  """Declares that all parameters of a module belong to level number `level`, from 0."""
  _change(module, lambda info: dataclasses.replace(info, level=level))


def _change(module: nnx.Module, change: Callable[[ParameterInfo], ParameterInfo]) -> None:
  for path, node in nnx.iter_graph(module):
    if isinstance(node, nnx.Param):
      node.set_metadata(info=change(declared(".".join(map(str, path)), node)))


def declared(name: str, parameter: nnx.Variable) -> ParameterInfo:
  """Returns the info of a parameter.

  Raises:
    TypeError: it has none.
  """
  info = parameter.get_metadata("info", None)
  if not isinstance(info, ParameterInfo):
    raise TypeError(f"parameter {name} declares neither kind nor axes; make it by models/parameters.py")
  return info
