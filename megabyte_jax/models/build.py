"""One of the models from its configuration, with or without memory."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout

from megabyte_jax.config import MegabyteConfig, ModelConfig
from megabyte_jax.models.block import compute_dtype
from megabyte_jax.models.kernels import cached_attention
from megabyte_jax.models.megabyte import Megabyte
from megabyte_jax.models.perceiver_ar import PerceiverAR
from megabyte_jax.models.stack import each_in_one_kernel, is_variable, unstacked
from megabyte_jax.parallel.parameter_names import parameter_name

Model = Megabyte | PerceiverAR


def make_model(config: ModelConfig, rngs: nnx.Rngs) -> Model:
  """A model with freshly drawn parameters."""
  return Megabyte(config, rngs) if isinstance(config, MegabyteConfig) else PerceiverAR(config, rngs)


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """The model without memory: its graph, and its parameters as nested dicts of ShapeDtypeStructs.

  `nnx.merge(graph, parameters)` with real parameters is the model again.
  """
  graph, state = nnx.split(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))))
  return graph, nnx.to_pure_dict(state)


def trained_model(config: ModelConfig, parameters: dict[str, Any]) -> Model:
  """The model with these parameters, for evaluation or generation.

  A fused attention that it was trained with by name may not serve here; the one for the devices at hand does.
  """
  if config.attention in ("cudnn", "splash"):
    config = dataclasses.replace(config, attention="auto")
  graph, _ = abstract_model(config)
  return nnx.merge(graph, parameters)


def initial_parameters(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Freshly drawn parameters as nested dicts; the same for the same key on any mesh, but for roundings."""
  return nnx.to_pure_dict(nnx.split(make_model(config, nnx.Rngs(key)))[1])


def in_compute_dtype(config: ModelConfig, parameters: nnx.State, rows: int) -> nnx.State:
  """Parameters as every step of decoding `rows` rows uses them: cast once, not each time. Those of norms stay float32.

  What is cast here, a step would cast itself before using it. For kernels they also lie as these read them, and
  layers that no single kernel takes together (stack_kernel.py) become arrays of their own.
  """
  sharding = jax.tree.leaves(parameters)[0].sharding
  kernels = cached_attention.wanted(config, compute_dtype(config)) and len(sharding.device_set) == 1
  if not kernels or not all(cached_attention.serves(level) for level in config.levels):
    return cast_for_decoding(config, parameters)
  return _prepare(config, sharding, each_in_one_kernel(config, rows))(parameters)


@functools.cache
def _prepare(config: ModelConfig, sharding: jax.sharding.Sharding, stacked: bool) -> Callable[[nnx.State], nnx.State]:
  """The jitted `prepared_for_decoding` on one device."""
  prepare = functools.partial(prepared_for_decoding, config, stacked=stacked)
  shapes = jax.eval_shape(lambda: prepare(nnx.split(make_model(config, nnx.Rngs(0)))[1]))
  layouts = decoding_layouts(shapes, stacked=stacked)
  return jax.jit(prepare, out_shardings=jax.tree.map(lambda layout: Format(layout, sharding), layouts))


@functools.partial(jax.jit, static_argnums=0)
def cast_for_decoding(config: ModelConfig, parameters: Any) -> Any:
  """The parameters in the compute dtype, but for those of norms."""
  dtype = compute_dtype(config)

  def cast(path, leaf):
    return leaf if re.search(r"norm\.(scale|bias)", parameter_name(path)) else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, parameters)


def prepared_for_decoding(config: ModelConfig, parameters: nnx.State, *, stacked: bool) -> nnx.State:
  """`cast_for_decoding`, and unless they stay stacked, each layer's parameters an array of their own."""

  def unstack(path, parameter):
    return unstacked(parameter) if "decoder.blocks" in parameter_name(path) and not stacked else parameter

  return jax.tree_util.tree_map_with_path(unstack, cast_for_decoding(config, parameters), is_leaf=is_variable)


def decoding_layouts(shapes: nnx.State, *, stacked: bool) -> nnx.State:
  """How such parameters lie in memory: those of products with their input axes last."""

  def layout(path, leaf):
    name, axes = parameter_name(path), tuple(range(leaf.ndim))
    if "decoder.blocks" not in name or "kernel" not in name:
      return Layout(axes)
    layers, inputs = int(stacked), 2 if "attention_out" in name else 1
    return Layout((*axes[:layers], *axes[layers + inputs :], *axes[layers : layers + inputs]))

  return jax.tree_util.tree_map_with_path(layout, shapes)
