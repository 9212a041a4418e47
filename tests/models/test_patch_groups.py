"""The finer levels on groups of patches: the same nats, loss and gradient as on all patches together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_variants import draw_parameters

from megabyte_jax.config import Level, MegabyteConfig, MeshConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.models.build import abstract_model
from megabyte_jax.models.layers import embedding_lookup
from megabyte_jax.models.loss import byte_nats, sum_of_nats
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh


def level(patch_size, width, **options):
  return Level(patch_size=patch_size, width=width, num_layers=1, num_heads=2, **options)


TWO = (level(4, 16), level(1, 8, rotary=True, conv_filters=(3,)))
THREE = (level(8, 32), level(2, 16), level(1, 8))
COARSE = (level(8, 16), level(2, 16))  # the last level's slots are pairs of bytes


def build(levels, groups, **options):
  config = MegabyteConfig(context=48, levels=levels, patch_groups=groups, **{"dropout": 0.0, **options})
  return abstract_model(config)[0], draw_parameters(config)


def random_bytes(rows=3, length=48):
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, (rows, length), np.uint8))


CASES = [
  (TWO, 3, {}, 48),
  pytest.param(TWO, 12, {}, 37, marks=pytest.mark.slow),  # as many groups as patches; two lack patches
  pytest.param(TWO, 4, {"span": 16}, 37, marks=pytest.mark.slow),
  pytest.param(THREE, 2, {}, 48, marks=pytest.mark.slow),
  pytest.param(COARSE, 5, {}, 3, marks=pytest.mark.slow),  # more groups than patches
]


@pytest.mark.parametrize(("levels", "groups", "options", "length"), CASES)
def test_nats_loss_and_gradient_are_those_of_all_patches_together(levels, groups, options, length):
  x_BT, length_B = random_bytes(length=length), jnp.array([length, 1, length // 2])

  def measure(groups):
    graph, parameters = build(levels, groups, **options)

    def loss(parameters):
      model = nnx.merge(graph, parameters)
      nats_BT, scored_BT = byte_nats(model, x_BT, length_B=length_B)
      total, count = jnp.sum(nats_BT), jnp.sum(scored_BT)
      if groups > 1:
        total, count = sum_of_nats(model, x_BT, length_B=length_B)
      return total / count, (nats_BT, scored_BT)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)

  (loss, (nats, scored)), gradient = measure(groups)
  (expected_loss, (expected_nats, expected_scored)), expected = measure(1)
  np.testing.assert_allclose(nats, expected_nats, atol=1e-5)
  np.testing.assert_array_equal(scored, expected_scored)
  assert loss == pytest.approx(float(expected_loss), rel=1e-6)
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(gradient), strict=True):
    scale = max(np.abs(leaf).max(), 1e-6)
    np.testing.assert_allclose(other, leaf, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  ("groups", "mesh"),
  [
    (3, {"data": 2, "seq": 4}),  # each device alone with a patch of every group
    pytest.param(4, {"data": 2, "seq": 4}, marks=pytest.mark.slow),  # 3 patches of a group on 4 devices
    pytest.param(3, {"data": 1, "seq": 4, "fsdp": 2}, marks=pytest.mark.slow),
  ],
)
def test_a_sequence_spread_over_devices(groups, mesh):
  x_BT = random_bytes(rows=2)

  def measure(groups, mesh):
    graph, parameters = build(TWO, groups)
    with jax.set_mesh(mesh):
      x = jax.device_put(x_BT, batch_sharding(mesh))
      return jax.jit(jax.value_and_grad(lambda p: sum_of_nats(nnx.merge(graph, p), x)[0]))(parameters)

  value, gradient = measure(groups, make_mesh(MeshConfig(**mesh)))
  expected_value, expected = measure(1, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  assert value == pytest.approx(float(expected_value), rel=1e-6)
  for leaf, other in zip(jax.tree.leaves(expected), jax.tree.leaves(gradient), strict=True):
    np.testing.assert_allclose(other, leaf, atol=2e-5 * np.abs(leaf).max())


@pytest.mark.slow
def test_dropout_is_the_same_on_a_mesh():
  graph, parameters = build(TWO, 3, dropout=0.5)

  def loss(mesh):
    with jax.set_mesh(mesh):
      x = jax.device_put(random_bytes(rows=2), batch_sharding(mesh))
      gradient = jax.value_and_grad(lambda p: sum_of_nats(nnx.merge(graph, p), x, dropout_key=jax.random.key(1))[0])
      return float(jax.jit(gradient)(parameters)[0])

  one = loss(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  assert loss(make_mesh(MeshConfig(data=2, seq=4))) == pytest.approx(one, rel=1e-6)


def test_dropout_is_repeatable():
  graph, parameters = build(TWO, 3, dropout=0.5)

  @jax.jit
  def sum_(key):
    return sum_of_nats(nnx.merge(graph, parameters), random_bytes(), dropout_key=key)[0]

  def loss(key):
    return float(sum_(jax.random.key(key)))

  assert loss(1) == loss(1) != loss(2)


def test_gradient_of_many_bytes_embeddings(monkeypatch):
  """The one-hot product in parts is that of all bytes."""
  x_BT = random_bytes(rows=2)

  def gradient():
    graph, parameters = build(TWO, 1)
    return jax.jit(jax.grad(lambda p: sum_of_nats(nnx.merge(graph, p), x_BT)[0]))(parameters)

  expected = gradient()
  monkeypatch.setattr(embedding_lookup, "_ONE_HOT", 10 * 256)
  for leaf, other in zip(jax.tree.leaves(expected), jax.tree.leaves(gradient()), strict=True):
    np.testing.assert_allclose(other, leaf, atol=2e-5 * np.abs(leaf).max())


@pytest.mark.parametrize(
  ("levels", "groups", "message"),
  [
    (TWO, 0, "patch_groups is 0; it must be at least 1"),
    (TWO[1:], 2, "no level below the first; set it to 1"),
    ((TWO[0], level(1, 8, rotary=True, cross_patch=2)), 2, "with cross-patch attention patches need"),
  ],
)
def test_groups_that_cannot_be(levels, groups, message):
  with pytest.raises(ConfigError, match=message):
    MegabyteConfig(context=48, levels=levels, patch_groups=groups)
