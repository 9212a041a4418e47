"""What each prediction depends on: as declared by receptive_field, by perturbation and by gradient."""

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.models.build import abstract_model
from megabyte_jax.models.receptive_field import receptive_field


def rows_of(declared):
  """Each row as the list of bytes it depends on."""
  return [np.flatnonzero(row).tolist() for row in declared]


@pytest.mark.parametrize(
  "name",
  [
    "two_levels",
    "transformer",
    "three_levels",
    "three_levels_cross_patch",
    "cross_patch",
    "conv",
    "odd_sizes",
  ],
)
def test_declared_field_is_every_earlier_byte(name):
  declared = receptive_field(variants.VARIANTS[name])
  assert rows_of(declared) == [list(range(t)) for t in range(variants.VARIANTS[name].context)]


def test_declared_field_of_the_ablations():
  own_patch = [list(range(t // 4 * 4, t)) for t in range(16)]
  earlier_patches = [list(range(t // 4 * 4)) for t in range(16)]
  assert rows_of(receptive_field(variants.VARIANTS["without_global"])) == own_patch
  assert rows_of(receptive_field(variants.VARIANTS["without_local"])) == earlier_patches
  # Two layers reach two patches back. The last byte of a patch (3, 7, 11) is no slot's input.
  reached = rows_of(receptive_field(variants.VARIANTS["without_global_cross_patch"]))
  assert reached[4] == [0, 1, 2]
  assert reached[8] == [0, 1, 2, 4, 5, 6]
  assert reached[12] == [4, 5, 6, 8, 9, 10]
  assert reached[15] == [4, 5, 6, 8, 9, 10, 12, 13, 14]
  # With r = 1, each layer sees the last slot of the patch before: its byte and, by the convolution, one more.
  reached = rows_of(receptive_field(variants.VARIANTS["without_global_short_cross_patch"]))
  assert reached[4] == [0, 1, 2]
  assert reached[8] == [1, 2, 4, 5, 6]
  assert reached[15] == [5, 6, 8, 9, 10, 12, 13, 14]


def test_declared_field_of_windows():
  # Two layers that see three slots back reach six slots back; slot t holds byte t - 1.
  assert rows_of(receptive_field(variants.VARIANTS["window"])) == [list(range(max(0, t - 7), t)) for t in range(16)]
  # Window 5 reaches eight slots back, its convolution two bytes further.
  wider = [list(range(max(0, t - 11), t)) for t in range(16)]
  assert rows_of(receptive_field(variants.VARIANTS["uneven_window"])) == wider
  # Two global layers that see one patch back, over the patch before: twelve bytes of earlier patches.
  expected = [list(range(max(0, t // 4 * 4 - 12), t)) for t in range(24)]
  assert rows_of(receptive_field(variants.VARIANTS["two_windows"])) == expected


def test_declared_field_of_perceiver_ar():
  assert rows_of(receptive_field(variants.VARIANTS["perceiver_ar"])) == [list(range(t)) for t in range(12, 20)]
  assert rows_of(receptive_field(variants.VARIANTS["perceiver_ar_all_latents"])) == [list(range(t)) for t in range(12)]


@pytest.mark.parametrize("name", variants.every_variant)
def test_perturbation_of_every_byte(name):
  config = variants.VARIANTS[name]
  T, declared = config.context, receptive_field(config)
  visible = np.zeros_like(declared)
  for seed in range(3):
    x_T = variants.random_bytes(name, 1, seed)[0]
    changed_TT = np.tile(x_T, (T, 1))
    changed_TT[np.arange(T), np.arange(T)] = (x_T + 1 + seed) % config.vocab_size  # row s differs at byte s alone
    change = np.abs(variants.logits(name, changed_TT) - variants.logits(name, np.tile(x_T, (T, 1)))).max(axis=-1).T
    assert (change[~declared] == 0).all()  # not a bit
    visible |= change > 1e-5
  np.testing.assert_array_equal(visible, declared)


def parts_with_table(parameters):
  return parameters["levels"].values() if "levels" in parameters else [parameters]


def byte_tables(parameters):
  return [part["embedder"]["table"] for part in parts_with_table(parameters)]


def with_tables(parameters, tables):
  parameters = jax.tree.map(lambda leaf: leaf, parameters)
  for part, table in zip(parts_with_table(parameters), tables, strict=True):
    part["embedder"]["table"] = table
  return parameters


@pytest.mark.parametrize("name", variants.every_variant_in_time)
def test_gradient_of_every_byte(name):
  """The text holds every value once, so the gradient of row v of a table is that of one byte's embedding.

  The output watched is the one value not in the text: the tied table adds nothing to the other rows.
  """
  config = variants.VARIANTS[name]
  graph, declared = abstract_model(config)[0], receptive_field(config)
  x_T = variants.distinct_bytes(name)

  @jax.jit
  def gradient(parameters, t):
    def watched(tables):
      return nnx.merge(graph, with_tables(parameters, tables))(jnp.asarray(x_T)[None])[0, t, -1]

    return jax.grad(watched)(byte_tables(parameters))

  depends = np.zeros_like(declared)
  for t in range(len(declared)):
    for table in gradient(variants.parameters(name), t):
      depends[t] |= (np.asarray(table)[x_T] != 0).any(axis=-1)
  np.testing.assert_array_equal(depends, declared)
