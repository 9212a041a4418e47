"""The probabilities of all sequences sum to one: nothing is predicted from itself, nothing is left out.

The same run pins a length that no patch size divides.
"""

import dataclasses
import itertools

import jax
import model_variants as variants
import numpy as np
import numpy_models as reference
import pytest
from flax import nnx

from megabyte_jax.models.build import abstract_model

LENGTH = 10  # ends within a patch of 3, 4 and 8 bytes, and within a span
VOCAB = 2


def two_valued(name):
  """(config, parameters, jitted forward pass) of a variant with a vocabulary of two."""
  config = dataclasses.replace(variants.VARIANTS[name], vocab_size=VOCAB)
  if variants.is_perceiver(config):
    config = dataclasses.replace(config, latents=LENGTH)
  graph = abstract_model(config)[0]
  return config, variants.draw_parameters(config), jax.jit(lambda p, x_BT: nnx.merge(graph, p)(x_BT))


def all_sequences(length):
  return np.array(list(itertools.product(range(VOCAB), repeat=length)), np.int32)


def log_probabilities(logits_BTV, x_BT):
  """float64 ln p of the last bytes of each row, as many as there are logits."""
  logits_BTV = logits_BTV.astype(np.float64)
  log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
  x_BN = x_BT[:, x_BT.shape[1] - logits_BTV.shape[1] :]
  return np.take_along_axis(log_p_BTV, x_BN[..., None], axis=-1)[..., 0].sum(axis=-1)


@pytest.mark.parametrize("name", variants.every_variant_in_time)
def test_probabilities_of_all_sequences_sum_to_one(name):
  config, parameters, forward = two_valued(name)
  x_BT = all_sequences(LENGTH)
  logits_BTV = np.asarray(forward(parameters, x_BT))
  probabilities = np.exp(log_probabilities(logits_BTV, x_BT))
  assert abs(probabilities.sum() - 1) < 1e-5
  assert probabilities.max() > 4 / len(x_BT)  # not the uniform distribution, which proves nothing
  for b in (0, 341, 1023):
    expected = reference.logits(x_BT[b], parameters, config)
    np.testing.assert_allclose(logits_BTV[b], expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", ["perceiver_ar", "perceiver_ar_rotary"])
def test_probabilities_of_all_continuations_sum_to_one(name):
  """PerceiverAR predicts only what its latents reach: the last 8 bytes after a prefix of 5."""
  config = dataclasses.replace(variants.VARIANTS[name], vocab_size=VOCAB)
  graph, parameters = abstract_model(config)[0], variants.draw_parameters(config)
  forward = jax.jit(lambda p, x_BT: nnx.merge(graph, p)(x_BT))
  totals = []
  for prefix in ([0, 1, 1, 0, 1], [1, 1, 1, 0, 0]):
    continuations = all_sequences(config.latents)
    x_BT = np.concatenate([np.tile(np.int32(prefix), (len(continuations), 1)), continuations], axis=1)
    log_p_B = log_probabilities(np.asarray(forward(parameters, x_BT)), x_BT)
    totals.append(np.exp(log_p_B))
    assert abs(totals[-1].sum() - 1) < 1e-5
  assert np.abs(totals[0] - totals[1]).max() > 1e-4  # the prefix is read
