"""One of the models from its configuration, with or without memory."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
from flax import nnx

from megabyte_jax.models.config import MegabyteConfig, ModelConfig
from megabyte_jax.models.layers import compute_dtype
from megabyte_jax.models.megabyte import Megabyte
from megabyte_jax.models.perceiver_ar import PerceiverAR

Model = Megabyte | PerceiverAR


def make_model(config: ModelConfig, rngs: nnx.Rngs) -> Model:
  """A model with freshly drawn parameters."""
  return (Megabyte if isinstance(config, MegabyteConfig) else PerceiverAR)(config, rngs)


def abstract_model(config: ModelConfig, *, training: bool = False) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """The model without memory: its graph, and its parameters as nested dicts of ShapeDtypeStructs.

  `nnx.merge(graph, parameters)` with real parameters is the model again. Only the one for `training` has products in
  eight bits: their scales depend on all bytes at once, as probabilities and decoding must not.
  """
  if not training:
    config = dataclasses.replace(config, products="compute_dtype")
  graph, state = nnx.split(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))))
  return graph, nnx.to_pure_dict(state)


def initial_parameters(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Freshly drawn parameters as nested dicts; the same for the same key on any mesh."""
  return nnx.to_pure_dict(nnx.split(make_model(config, nnx.Rngs(key)))[1])


@functools.partial(jax.jit, static_argnums=0)
def in_compute_dtype(config: ModelConfig, parameters: Any) -> Any:
  """Parameters as every step of decoding uses them: cast once, not each time. Those of norms stay float32.

  What is cast here, a step would cast itself before using it.
  """
  dtype = compute_dtype(config)

  def cast(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return leaf if re.search(r"norm\.(scale|bias)", name) else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, parameters)
