"""Models run under a mesh of the user's own, whose axes are called otherwise, and within shard_map, with one result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from model_variants import draw_parameters

from megabyte_jax.config import Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.generation.sampling import generate
from megabyte_jax.models.build import abstract_model
from megabyte_jax.models.loss import byte_nats

MEGABYTE = MegabyteConfig(
  context=16,
  levels=(
    Level(patch_size=4, width=16, num_layers=1, num_heads=2),
    Level(patch_size=1, width=8, num_layers=1, num_heads=2),
  ),
)
PERCEIVER = PerceiverARConfig(context=16, latents=8, width=8, num_layers=1, num_heads=2)
X = np.random.default_rng(0).integers(0, 256, (4, 16), np.uint8)


def mesh_of(kind=AxisType.Auto):
  return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def build(config):
  graph, _ = abstract_model(config)
  return graph, draw_parameters(config)


@pytest.mark.parametrize(
  "config", [pytest.param(MEGABYTE, id="megabyte"), pytest.param(PERCEIVER, id="perceiver_ar", marks=pytest.mark.slow)]
)
def test_nats_are_the_same_on_it(config):
  graph, parameters = build(config)

  def nats(parameters, x_BT):
    return byte_nats(nnx.merge(graph, parameters), x_BT)[0]

  expected = jax.jit(nats)(parameters, X)
  mesh = mesh_of()
  with jax.set_mesh(mesh):
    x_BT = jax.device_put(X, NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(jax.jit(nats)(parameters, x_BT), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(nats)(parameters, X[:3]), expected[:3], rtol=1e-5)  # 2 does not divide 3
    mapped = jax.shard_map(nats, in_specs=(P(), P("data")), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(mapped)(parameters, x_BT), expected, rtol=1e-5)


@pytest.mark.slow
def test_generation_is_the_same_on_it():
  graph, parameters = build(MEGABYTE)
  expected = generate(nnx.merge(graph, parameters), b"abc", 20, num_samples=3).bytes_
  mesh = mesh_of()
  with jax.set_mesh(mesh):
    made = generate(nnx.merge(graph, parameters), b"abc", 20, num_samples=3).bytes_
  np.testing.assert_array_equal(made, expected)
  spread = jax.device_put(parameters, NamedSharding(mesh, P()))
  made = generate(nnx.merge(graph, spread), b"abc", 20, num_samples=3).bytes_
  np.testing.assert_array_equal(made, expected)


def test_explicit_axes_are_named():
  graph, parameters = build(MEGABYTE)
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh), pytest.raises(ConfigError, match=r"Explicit axes of a mesh .*axis_types="):
    byte_nats(nnx.merge(graph, parameters), jax.device_put(X, NamedSharding(mesh, P("data"))))
  cut = jax.tree.map(
    lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "data"))), parameters
  )
  model = nnx.merge(graph, cut)
  with pytest.raises(ConfigError, match="the model's parameters lie on Explicit axes"):
    generate(model, b"abc", 4)
  with jax.set_mesh(mesh), pytest.raises(ConfigError, match="the model's parameters lie on Explicit axes"):
    model(X)


@pytest.mark.parametrize("config", [MEGABYTE, PERCEIVER], ids=["megabyte", "perceiver_ar"])
@pytest.mark.parametrize(
  ("x", "message"),
  [
    (X[0], r"the input has the shape \(16,\); give \[batch, bytes\], such as x\[None\]"),
    (X[None], r"the input has the shape \(1, 4, 16\); give \[batch, bytes\]"),
    (X[:0], "the batch is empty"),
    (X[:, :0], "the input has 0 bytes; the model takes 1 to 16"),
    (X.astype(np.float32), "the input has the type float32; bytes are integers"),
    (np.full((1, 3), 256), "knows only bytes below 256 .*; the data have 256"),
    (np.full((1, 3), -1), "knows only bytes below 256 .*; the data have -1"),
    ([[1, 2]], "the input is of type list; give an array"),
  ],
)
@pytest.mark.parametrize("call", ["model", "byte_nats"])
def test_what_is_no_batch_of_bytes_is_named(config, x, message, call):
  graph, parameters = build(config)
  model = nnx.merge(graph, parameters)
  with pytest.raises(ConfigError, match=message):
    model(x) if call == "model" else byte_nats(model, x)


def test_numbers_are_looked_at_for_smaller_vocabularies_too():
  graph, parameters = build(dataclasses.replace(MEGABYTE, vocab_size=100))
  with pytest.raises(ConfigError, match="knows only bytes below 100"):
    nnx.merge(graph, parameters)(jnp.full((1, 4), 100, jnp.uint8))


def test_shapes_belong_to_no_mesh():
  """They are kept, and serve under another mesh, too."""
  config = dataclasses.replace(MEGABYTE, init_std=0.02)  # as no other test has it
  with jax.set_mesh(mesh_of()):
    shapes = abstract_model(config)[1]
  assert {leaf.sharding for leaf in jax.tree.leaves(shapes)} == {None}
