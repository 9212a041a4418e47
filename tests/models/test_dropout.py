"""Dropout and its random numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megabyte_jax.models.layers.dropout import dropout, random_bits

SHAPE = (4, 16, 8, 256)
NUMBERS = 4 * 16 * 8 * 256


def bits(seed: int, shape=SHAPE) -> np.ndarray:
  return np.asarray(random_bits(jax.random.key(seed), shape))


def test_dropout_zeroes_its_share_and_keeps_the_mean():
  x = jnp.linspace(-2, 3, 20_000).reshape(100, 200)
  y = np.asarray(dropout(x, 0.3, jax.random.key(0)))
  dropped = y == 0
  assert abs(dropped.mean() - 0.3) < 0.015
  np.testing.assert_allclose(y[~dropped], np.asarray(x)[~dropped] / 0.7, rtol=1e-6)
  assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_chance_allows(rate):
  """Within five standard deviations of the binomial distribution, over all numbers and in the worst row and column."""
  for seed in range(3):
    dropped = np.asarray(dropout(jnp.ones(SHAPE), rate, jax.random.key(seed))).reshape(-1, SHAPE[-1]) == 0
    for share, count in ((dropped.mean(), dropped.size), (dropped.mean(0), len(dropped)), (dropped.mean(1), SHAPE[-1])):
      assert np.abs(share - rate).max() < 5 * (rate * (1 - rate) / count) ** 0.5


def test_every_bit_is_set_half_of_the_time_and_by_itself():
  """The 32 bits of a number, and those of its neighbours in every direction, are uncorrelated."""
  signs = 2.0 * np.unpackbits(bits(5).view(np.uint8).reshape(*SHAPE, 4), axis=-1) - 1  # [4, 16, 8, 256, 32]
  limit = 6 / NUMBERS**0.5
  flat = signs.reshape(-1, 32)
  assert np.abs(flat.mean(0)).max() < limit
  correlation = flat.T @ flat / NUMBERS - np.eye(32)
  assert np.abs(correlation).max() < limit
  for axis, step in itertools.product(range(4), (1, 2)):
    later, earlier = (
      np.take(signs, range(a, b), axis).reshape(-1, 32) for a, b in ((step, SHAPE[axis]), (0, SHAPE[axis] - step))
    )
    assert np.abs(later.T @ earlier / len(later)).max() < 6 / len(later) ** 0.5


def test_other_keys_give_other_numbers():
  keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(8)]
  kept = [np.asarray(random_bits(key, SHAPE)).ravel() >= 2**31 for key in keys]
  for one, other in itertools.combinations(kept, 2):
    assert abs((one == other).mean() - 0.5) < 6 * 0.5 / NUMBERS**0.5


def test_numbers_do_not_depend_on_the_mesh():
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "seq"))
  spread = NamedSharding(mesh, PartitionSpec("data", "seq"))
  here = jax.jit(random_bits, static_argnums=1, out_shardings=spread)(jax.random.key(3), SHAPE)
  np.testing.assert_array_equal(here, bits(3))
