"""Probabilities that adapt to a file learn what repeats in it, and stay probabilities whatever the model says."""

import jax
import model_variants
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.config import Level, MegabyteConfig
from megabyte_jax.generation import compression, entropy_coding
from megabyte_jax.generation.adaptation import Adaptation
from megabyte_jax.models.build import abstract_model, for_windows

V = 256


def nats_of(rows, p_V, adaptation):
  """The nats of each byte of rows coded side by side, [R, T], by a model that always says p_V."""
  adaptation.start(len(rows))
  p_RV, found = np.tile(p_V, (len(rows), 1)), []
  for bytes_R in rows.T:
    q_RV = adaptation.mix(p_RV)
    assert q_RV.shape == p_RV.shape and np.isfinite(q_RV).all() and (q_RV >= 0).all()
    np.testing.assert_allclose(q_RV.sum(axis=1), 1, rtol=1e-5)
    found.append(-np.log(q_RV[np.arange(len(rows)), bytes_R]))
    adaptation.learn(bytes_R)
  return np.stack(found, axis=1)


def uniform():
  return np.full(V, 1 / V, np.float32)


def test_what_comes_again_is_cheap():
  phrase = np.random.default_rng(0).integers(0, V, 100, np.uint8)
  nats = nats_of(np.tile(phrase, 4)[None], uniform(), Adaptation(V, 400))[0]
  assert nats[:100].mean() == pytest.approx(np.log(V), rel=0.02)
  assert nats[300:].mean() < 1.5


def test_rows_and_later_windows_learn_from_each_other():
  phrase = np.random.default_rng(0).integers(0, V, 100, np.uint8)
  other = np.random.default_rng(1).integers(0, V, 100, np.uint8)
  adaptation = Adaptation(V, 400)
  nats_of(np.stack([phrase, other]), uniform(), adaptation)
  assert nats_of(np.stack([other, phrase]), uniform(), adaptation)[:, 20:].mean() < 0.8 * np.log(V)


def test_a_model_that_rules_bytes_out_is_outvoted():
  p_V = np.zeros(V, np.float32)
  p_V[7] = 1
  nats = nats_of(np.full((1, 200), 9, np.uint8), p_V, Adaptation(V, 200))[0]
  assert nats[0] > 20 and nats[-1] < 1


def test_random_bytes_cost_hardly_more():
  rows = np.random.default_rng(2).integers(0, V, (8, 500), np.uint8)
  assert nats_of(rows, uniform(), Adaptation(V, 4000)).mean() < 1.02 * np.log(V)


MODEL = MegabyteConfig(
  context=128,
  levels=(
    Level(patch_size=4, width=16, num_layers=1, num_heads=2),
    Level(patch_size=1, width=8, num_layers=1, num_heads=2, rotary=True),
  ),
)


@pytest.fixture(scope="module")
def model():
  return nnx.merge(abstract_model(MODEL)[0], model_variants.draw_parameters(MODEL))


def test_short_windows_have_the_same_probabilities_and_smaller_caches(model):
  short = for_windows(model, 30)
  assert short.config.context == 32 and for_windows(model, 128) is model is for_windows(model, 1000)
  x_BT = np.random.default_rng(0).integers(0, V, (2, 32))
  made, expected = (jax.jit(lambda x_BT, one=one: one(x_BT))(x_BT) for one in (short, model))
  np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)
  assert short.start_bytes(2).decoded.caches[0].k_LBNSHK.shape[3] == 8


def test_a_compressed_file_is_smaller_with_adaptation_and_says_how_it_was_made(model, monkeypatch):
  text = b"The quick brown fox jumps over the lazy dog, " * 20
  packed = {adapt: compression.compress(model, text, window=64, adapt=adapt) for adapt in (False, True)}
  assert len(packed[True]) < 0.7 * len(packed[False])
  coding = compression.read(packed[True])[0].coding
  assert (coding.window, coding.adapt, coding.batch) == (64, True, 15)
  assert compression.decompress(model, packed[True]) == text
  assert compression.stored_bytes(packed[True], MODEL) == 0


def test_rounds_of_windows_are_nearly_full():
  sizes = [entropy_coding.batch_size(length, MODEL, 64) for length in (0, 1, 128, 129, 64 * 128, 65 * 128, 100 * 128)]
  assert sizes == [1, 1, 1, 2, 64, 33, 50]
  assert all(entropy_coding.batch_size(100 * 128, MODEL, size) == size for size in sizes[-1:])
