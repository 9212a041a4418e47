"""Builds models from their configs, with real parameters or as shapes only."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout

from megabyte_jax.config import (
  BlockRecurrentConfig,
  CompressiveTransformerConfig,
  MegabyteConfig,
  ModelConfig,
  PerceiverARConfig,
  TransformerXLConfig,
)
from megabyte_jax.models.block_recurrent import BlockRecurrent
from megabyte_jax.models.compressive_transformer import CompressiveTransformer
from megabyte_jax.models.family import Model
from megabyte_jax.models.kernels import cached_attention
from megabyte_jax.models.layers.quantised import check_weights, quantise
from megabyte_jax.models.layers.stack import each_in_one_kernel, unstacked
from megabyte_jax.models.megabyte import Megabyte
from megabyte_jax.models.parameters import Keys, as_rngs, compute_dtype, declared
from megabyte_jax.models.perceiver_ar import PerceiverAR
from megabyte_jax.models.transformer_xl import TransformerXL
from megabyte_jax.parallel.parameter_info import ParameterInfo, is_variable, map_with_info, parameter_name

# The model of each family's config; every other room asks the config (config/model.py) or the model (family.py).
Family = Callable[[Any, nnx.Rngs], Model]
FAMILIES: dict[type[ModelConfig], Family] = {
  MegabyteConfig: Megabyte,
  PerceiverARConfig: PerceiverAR,
  TransformerXLConfig: TransformerXL,
  BlockRecurrentConfig: BlockRecurrent,
  CompressiveTransformerConfig: CompressiveTransformer,
}


def family_of(config: ModelConfig) -> Family:
  """Returns what makes models of this config; what is kept for a config is kept for its family, too."""
  return FAMILIES[type(config)]


def make_model(config: ModelConfig, rngs: nnx.Rngs) -> Model:
  """Makes a model with freshly drawn parameters."""
  graph, _, keys = _abstract(config, family_of(config))
  stream = rngs.params
  first = stream.count[...]
  stream.count[...] = first + keys  # who uses `rngs` again is given other keys
  return nnx.merge(graph, _draw(config, family_of(config))(stream.key[...], first))


@functools.lru_cache(maxsize=64)
def _draw(config: ModelConfig, family: Family) -> Callable[[jax.Array, jax.Array], nnx.State]:
  """Returns one program for all parameters: drawn one by one, each shape is compiled by itself."""
  return jax.jit(lambda key, first: nnx.split(family(config, as_rngs(Keys(key, first))))[1])


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """Returns a model as shapes only: its graph, and its parameters as nested dicts of ShapeDtypeStructs.

  `nnx.merge(graph, parameters)` with real parameters is the model again.
  """
  graph, state, _ = _abstract(config, family_of(config))
  return graph, nnx.to_pure_dict(state)


@functools.lru_cache(maxsize=256)
def _abstract(config: ModelConfig, family: Family) -> tuple[nnx.GraphDef, nnx.State, int]:
  """Returns the graph, the shapes, which know nothing of a mesh, and how many random keys the parameters take."""
  keys = Keys(None)
  graph, state = nnx.split(nnx.eval_shape(lambda: family(config, as_rngs(keys))))
  return graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state), int(keys.given)


def parameter_info(config: ModelConfig) -> Mapping[str, ParameterInfo]:
  """Returns what every parameter declares, by its name in `abstract_model`: kind, logical axes, fan-in, level.

  Raises:
    TypeError: a parameter declares nothing, or another number of axes than it has.
  """
  return _parameter_info(config, family_of(config))


@functools.cache
def _parameter_info(config: ModelConfig, family: Family) -> Mapping[str, ParameterInfo]:
  _, state, _ = _abstract(config, family)
  infos = {}
  for path, parameter in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable):
    name = parameter_name(path)
    infos[name] = declared(name, parameter)
    if len(infos[name].axes) != len(parameter.shape):
      raise TypeError(f"parameter {name} of shape {parameter.shape} declares the axes {infos[name].axes}")
  return types.MappingProxyType(infos)


def trained_model(config: ModelConfig, parameters: dict[str, Any]) -> Model:
  """Returns the model with these parameters, for evaluation or generation; see `ModelConfig.for_evaluation`.

  A fused attention that it was trained with by name may not serve here; the one for the devices at hand does.
  """
  config = config.for_evaluation
  if config.attention in ("cudnn", "splash"):
    config = dataclasses.replace(config, attention="auto")
  graph, _ = abstract_model(config)
  return nnx.merge(graph, parameters)


def empty_memory(config: ModelConfig, parameters: dict[str, Any], rows: int) -> Any:
  """Returns the memory of a recurrent model before so many documents begin; () for other models."""
  graph, _ = abstract_model(config)
  return nnx.merge(graph, parameters).empty_memory(rows) if config.recurrent else ()


def for_windows(model: Model, length: int) -> Model:
  """Returns the model for windows of at most `length` bytes: its caches are no larger, its probabilities the same."""
  config = model.config.shortened(length)
  if config == model.config:
    return model
  graph, abstract = abstract_model(config)
  parameters = nnx.to_pure_dict(nnx.state(model))
  return nnx.merge(graph, jax.tree.map(lambda a, short: a[tuple(map(slice, short.shape))], parameters, abstract))


def initial_parameters(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Draws parameters as nested dicts; the same for the same key on any mesh, but for roundings."""
  return nnx.to_pure_dict(nnx.split(family_of(config)(config, as_rngs(Keys(key))))[1])


def in_compute_dtype(config: ModelConfig, parameters: nnx.State, rows: int, weights: str = "") -> nnx.State:
  """Returns parameters as every step of decoding `rows` rows uses them, cast once; those of norms stay float32.

  With weights="int8" matrices are in 8 bits (models/layers/quantised.py).

  What is cast here, a step would cast itself before using it. For kernels they also lie as these read them, and
  layers that no single kernel takes together (decoding_step.py) become arrays of their own.
  """
  sharding = jax.tree.leaves(parameters)[0].sharding
  kernels = cached_attention.wanted(config, compute_dtype(config)) and len(sharding.device_set) == 1
  if not kernels or config.recurrent or any(cached_attention.obstacle(level, config) for level in config.levels):
    return cast_for_decoding(config, parameters, weights)
  return _prepare(config, sharding, each_in_one_kernel(config, rows), weights)(parameters)


@functools.cache
def _prepare(
  config: ModelConfig, sharding: jax.sharding.Sharding, stacked: bool, weights: str
) -> Callable[[nnx.State], nnx.State]:
  """Returns the jitted `prepared_for_decoding` on one device."""
  prepare = functools.partial(prepared_for_decoding, config, stacked=stacked, weights=weights)
  shapes = jax.eval_shape(prepare, _abstract(config, family_of(config))[1])
  layouts = decoding_layouts(config, shapes, stacked=stacked)
  return jax.jit(prepare, out_shardings=jax.tree.map(lambda layout: Format(layout, sharding), layouts))


@functools.partial(jax.jit, static_argnums=(0, 2))
def cast_for_decoding(config: ModelConfig, parameters: Any, weights: str = "") -> Any:
  """Returns the parameters in the compute dtype, but for those of norms; matrices in 8 bits where weights="int8"."""
  check_weights(weights)
  dtype = compute_dtype(config)

  def cast(parameter, info):
    if weights == "int8" and info.kind == "matrix":
      return _in_eight_bits(parameter, info)
    return parameter if info.kind == "norm" else jax.tree.map(lambda a: a.astype(dtype), parameter)

  return map_with_info(cast, parameters, parameter_info(config))


@functools.partial(jax.jit, static_argnums=0)
def in_eight_bits(config: ModelConfig, parameters: Any) -> Any:
  """Returns the parameters with matrices in 8 bits (models/layers/quantised.py), the others as they are."""

  def change(parameter, info):
    return _in_eight_bits(parameter, info) if info.kind == "matrix" else parameter

  return map_with_info(change, parameters, parameter_info(config))


def _in_eight_bits(parameter: Any, info: ParameterInfo) -> Any:
  return jax.tree.map(lambda a: quantise(a, info.input_places), parameter)


def prepared_for_decoding(config: ModelConfig, parameters: nnx.State, *, stacked: bool, weights: str = "") -> nnx.State:
  """Returns `cast_for_decoding`; unless they stay stacked, each layer's parameters become an array of their own."""

  def unstack(parameter, info):
    return unstacked(parameter) if "layers" in info.axes and not stacked else parameter

  return map_with_info(unstack, cast_for_decoding(config, parameters, weights), parameter_info(config))


def decoding_layouts(config: ModelConfig, shapes: nnx.State, *, stacked: bool) -> nnx.State:
  """Returns how such parameters lie in memory: those of the layers' products with their input axes last."""

  def layout(parameter, info):
    axes = info.axes if stacked else tuple(axis for axis in info.axes if axis != "layers")
    order = list(range(len(axes)))
    if "layers" in info.axes and info.kind == "matrix":
      order = sorted(order, key=lambda i: axes[i] in info.inputs)  # stable: the others keep their order
    return jax.tree.map(lambda a: Layout(tuple(order if a.ndim == len(axes) else range(a.ndim))), parameter)

  return map_with_info(layout, shapes, parameter_info(config))
