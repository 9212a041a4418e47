"""Weights in 8 bits: how much is rounded, that decoding uses them, reads no other, and that nothing keeps them."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import model_variants
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.exported import export_model
from megabyte_jax.config import (
  BlockRecurrentConfig,
  CompressiveTransformerConfig,
  Config,
  Level,
  MegabyteConfig,
  ModelConfig,
  PerceiverARConfig,
  TransformerXLConfig,
)
from megabyte_jax.errors import ConfigError
from megabyte_jax.generation.compression import compress
from megabyte_jax.generation.sampling import generate
from megabyte_jax.models import build
from megabyte_jax.models.kernels import decoding_step
from megabyte_jax.models.layers.quantised import Quantised, is_quantised, quantise
from megabyte_jax.models.layers.stack import Cache, Stack, stack_weights, unstacked
from megabyte_jax.models.parameters import declared
from megabyte_jax.parallel.parameter_info import is_variable, map_with_info, parameter_name

RECURRENT: dict[str, Any] = dict(context=4, vocab_size=13, width=16, num_layers=1, num_heads=4, dropout=0.0)
LEVELS = (
  Level(patch_size=4, width=32, num_layers=2, num_heads=2),
  Level(patch_size=1, width=16, num_layers=2, num_heads=2),
)
COARSE = Level(patch_size=4, width=32, num_layers=1, num_heads=2, rotary=True)
FINE = Level(patch_size=1, width=16, num_layers=1, num_heads=2)
MODELS: dict[str, ModelConfig] = {
  "megabyte": MegabyteConfig(
    context=16, levels=(COARSE, FINE), dropout=0.0, activation="swiglu", qk_norm=True, norm="rmsnorm", bias=False
  ),
  "transformer": MegabyteConfig(context=16, levels=(dataclasses.replace(FINE, num_layers=2),), dropout=0.0),
  "perceiver_ar": PerceiverARConfig(context=16, latents=8, width=16, num_layers=1, num_heads=2, dropout=0.0),
  "transformer_xl": TransformerXLConfig(**RECURRENT, memory_length=6),
  "block_recurrent": BlockRecurrentConfig(**RECURRENT, window=2, states=3, recurrent_layers=(0,)),
  "compressive_transformer": CompressiveTransformerConfig(**RECURRENT, memory_length=4, compressed_length=3),
}


def rounded(config, parameters):
  """Reference: each matrix as the nearest multiples of its outputs' scales, in NumPy."""

  def one(matrix, info):
    if info.kind != "matrix":
      return matrix
    matrix = np.asarray(matrix, np.float64)
    scale = np.abs(matrix).max(axis=info.input_places, keepdims=True) / 127
    return jnp.asarray(np.rint(matrix / scale) * scale, jnp.float32)

  return map_with_info(one, parameters, build.parameter_info(config))


def test_a_matrix_of_integers_comes_back_exactly():
  rng = np.random.default_rng(0)
  integers = rng.integers(-127, 128, (3, 20, 2, 5))  # layers, inputs, two axes of outputs
  integers[:, 0] = rng.choice([-127, 127], (3, 2, 5))
  scale = 2.0 ** rng.integers(-9, 3, (3, 2, 5))
  made = quantise(jnp.asarray(integers * scale[:, None], jnp.float32), (1,))
  assert made.values.dtype == jnp.int8 and made.scale.dtype == jnp.float32
  np.testing.assert_array_equal(made.values, integers)
  np.testing.assert_array_equal(made.scale, scale)


def test_no_weight_moves_by_more_than_half_a_step_of_its_output():
  """Of two input axes; an output without weights stays without."""
  matrix = np.random.default_rng(1).standard_normal((6, 7, 5)).astype(np.float32) * [1, 100, 1e-6, 1, 0]
  made = quantise(jnp.asarray(matrix, jnp.float32), (0, 1))
  assert made.scale.shape == (5,) and made.num_inputs == 2
  moved = np.abs(np.asarray(made.astype(jnp.float32)) - matrix).max(axis=(0, 1))
  assert (moved <= np.abs(matrix).max(axis=(0, 1)) / 127 / 2 * (1 + 1e-5)).all() and moved[0] > 0
  assert not moved[4] and (np.abs(made.values).max(axis=(0, 1)) == [127, 127, 127, 127, 0]).all()


@pytest.mark.parametrize(
  "name",
  [
    "megabyte",
    "transformer_xl",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("transformer", "perceiver_ar", "block_recurrent", "compressive_transformer")
    ),
  ],
)
def test_generation_takes_every_matrix_in_eight_bits(name):
  """Bytes and their probabilities are those of the same model with rounded matrices, and not those without."""
  config = MODELS[name]
  graph, abstract = build.abstract_model(config)
  parameters = model_variants.draw_parameters(config)
  infos = build.parameter_info(config)
  expected_names = {name for name, info in infos.items() if info.kind == "matrix"}
  made = jax.eval_shape(lambda: build.in_eight_bits(config, parameters))
  flat = jax.tree_util.tree_leaves_with_path(made, is_leaf=lambda node: isinstance(node, Quantised))
  in_eight = {
    jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in flat if isinstance(leaf, Quantised)
  }
  assert in_eight == expected_names and expected_names
  prompt = b"\1\2\3\4\5"

  def run(parameters, weights):
    return generate(nnx.merge(graph, parameters), prompt, 20, seed=1, weights=weights)

  in_eight_bits, of_rounded = run(parameters, "int8"), run(rounded(config, parameters), "")
  np.testing.assert_array_equal(in_eight_bits.bytes_, of_rounded.bytes_)
  np.testing.assert_allclose(in_eight_bits.nats, of_rounded.nats, atol=2e-4)
  as_trained = run(parameters, "")
  same = (as_trained.bytes_ == in_eight_bits.bytes_).all(axis=0)
  first = int(np.argmin(same)) if not same.all() else same.size  # from here on the texts differ
  assert np.abs(as_trained.nats - in_eight_bits.nats)[:, : first + 1].max() > 1e-3


def test_the_loop_over_bytes_reads_eight_bits():
  """In the compiled program nowhere are all layers of a matrix in a format of floats, only one layer at a time."""
  config = dataclasses.replace(MODELS["transformer"], compute_dtype="bfloat16")
  graph, parameters = nnx.split(build.make_model(config, nnx.Rngs(0)))

  @jax.jit
  def decode(parameters, state):
    def one(_, state):
      return nnx.merge(graph, parameters).decode_patch(state, lambda logits, _: jnp.argmax(logits, axis=-1))[0]

    return jax.lax.fori_loop(0, 8, one, state)

  prepared = build.in_compute_dtype(config, parameters, 1, "int8")
  lowered = decode.lower(prepared, nnx.merge(graph, prepared).start_bytes(1).decoded)
  assert "optimization_barrier" in lowered.as_text()  # a CPU's XLA would leave the conversion there by itself
  text = lowered.compile().as_text() or ""
  infos = build.parameter_info(config)
  flat = jax.tree_util.tree_leaves_with_path(build.abstract_model(config)[1])
  named = {parameter_name(path): leaf.shape for path, leaf in flat}
  shapes = [named[name] for name, info in infos.items() if info.kind == "matrix"]
  assert len(shapes) == 4 and all(shape[0] == 2 for shape in shapes)  # layers
  for shape in shapes:
    assert set(re.findall(rf"\b(\w+)\[{','.join(map(str, shape))}\]", text)) == {"s8"}, shape


@pytest.mark.parametrize("way", [pytest.param("in one kernel", marks=pytest.mark.slow), "layer by layer"])
def test_kernels_take_eight_bits(way):
  """Interpreted, in float32: what the plain step makes of the same weights."""
  level = Level(patch_size=1, width=64, num_layers=2, num_heads=4, ff_width=128)
  config = MegabyteConfig(context=8, levels=(level,), activation="swiglu", init_std=0.2, compute_dtype="float32")
  assert decoding_step.obstacle(level, config, 1) == ""
  stack = nnx.jit(lambda: Stack(level, config, nnx.Rngs(0)))()  # one program

  def change(path, parameter):
    info = declared(parameter_name(path), parameter)
    return parameter.replace(quantise(parameter[...], info.input_places)) if info.kind == "matrix" else parameter

  graph: Any
  state: Any
  graph, state = nnx.split(stack)
  state = jax.tree_util.tree_map_with_path(change, state, is_leaf=is_variable)
  stack = nnx.merge(graph, state)
  rng, rows, slot = np.random.default_rng(0), 1 if way == "in one kernel" else 3, jnp.int32(5)
  x = jnp.asarray(rng.standard_normal((rows, 1, 1, 64)), jnp.float32)
  cache = Cache(*jnp.asarray(rng.standard_normal((2, 2, rows, 1, 8, 4, 16)), jnp.float32))
  expected, expected_cache = jax.jit(stack.step)(x, cache, slot, False)
  if rows == 1:
    made, *new = decoding_step.step(
      x[0, 0, 0],
      stack_weights(stack),
      *(a[:, 0, 0] for a in cache),
      first=jnp.int32(0),
      at=slot,
      slot=slot,
      level=level,
      options=config,
      epsilon=1e-5,
    )
    made, new = stack.norm(made)[None, None, None], [a[:, None, None] for a in new]
  else:
    state["blocks"] = jax.tree.map(unstacked, state["blocks"], is_leaf=is_variable)
    of_layers: Stack = nnx.merge(graph, state)
    made, new = jax.jit(of_layers.step)(x, cache, slot, False)
  np.testing.assert_allclose(made, expected, atol=2e-5)
  for a, b in zip(new, expected_cache, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_weights_in_eight_bits_lie_as_kernels_read_them():
  """Inputs last, as those of floats; scales as they are."""
  config = dataclasses.replace(MODELS["transformer"], compute_dtype="bfloat16")
  shapes = jax.eval_shape(
    lambda: build.prepared_for_decoding(
      config, nnx.split(build.make_model(config, nnx.Rngs(0)))[1], stacked=False, weights="int8"
    )
  )
  layouts: Any = build.decoding_layouts(config, shapes, stacked=False)
  layout = layouts["levels"][0]["decoder"]["blocks"]["qkv"]["kernel"].get_value()[1]  # of the second layer
  assert layout.values.major_to_minor == (1, 2, 3, 0) and layout.scale.major_to_minor == (0, 1, 2)


def test_weights_in_eight_bits_are_refused_where_they_would_last(tmp_path):
  config = MODELS["transformer"]
  graph, _ = build.abstract_model(config)
  parameters = build.in_eight_bits(config, model_variants.draw_parameters(config))
  assert is_quantised(parameters)
  with pytest.raises(ConfigError, match=r"compression takes the weights as they were trained"):
    compress(nnx.merge(graph, parameters), b"text")
  run = Config(model=config, batch_size=1, num_steps=1)
  with pytest.raises(ConfigError, match=r"an exported model takes the weights as they were trained"):
    export_model(str(tmp_path / "exported"), run, parameters, 1)
  with (
    Checkpoints(str(tmp_path / "run")) as checkpoints,
    pytest.raises(ConfigError, match=r"a checkpoint takes the weights as they were trained"),
  ):
    checkpoints.save(1, parameters, {}, {})
  with pytest.raises(ConfigError, match=r"weights='int4' is not a format of weights; take int8"):
    generate(nnx.merge(graph, model_variants.draw_parameters(config)), b"", 1, weights="int4")
