"""Section 2 of the paper, equation by equation, and whole models, against plain NumPy."""

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import numpy_models as reference
import pytest

P, K = 4, 6  # of the two-level model below: patches of 4 bytes, 6 of them


@pytest.fixture(scope="module")
def paper():
  """(the paper's two-level model, its parameters, a batch of two texts)."""
  return variants.model("two_levels"), variants.parameters("two_levels"), variants.random_bytes("two_levels", 2)


def close(ours, expected):
  np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=2e-5)


def test_equation_1_embeds_each_byte_and_adds_its_position(paper):
  model, p, x_BT = paper
  table, positions = (np.asarray(p["levels"][0]["embedder"][name]) for name in ("table", "positions"))
  h_embed = np.asarray(model.levels[0].embedder.embed(x_BT[:, None]))
  assert h_embed.shape == (2, 1, P * K, 4)
  for b in range(2):
    for t in range(P * K):
      close(h_embed[b, 0, t], table[x_BT[b, t]] + positions[t])


def test_equation_2_shifts_patches_by_one_behind_the_pad(paper):
  model, p, x_BT = paper
  embedder = model.levels[0].embedder
  h_embed = np.asarray(embedder.embed(x_BT[:, None]))
  h_global_in = np.asarray(embedder.slots(x_BT[:, None]))
  assert h_global_in.shape == (2, 1, K, 16)
  pad = np.asarray(p["levels"][0]["embedder"]["pad"])
  assert pad.shape == (P, 4)  # one row a byte, trained, and without a position
  for b in range(2):
    np.testing.assert_array_equal(h_global_in[b, 0, 0], pad.reshape(-1))
    for k in range(1, K):
      before = [h_embed[b, 0, t] for t in range((k - 1) * P, k * P)]
      np.testing.assert_array_equal(h_global_in[b, 0, k], np.concatenate(before))


def test_equation_3_is_a_causal_transformer_over_patches(paper):
  model, p, _ = paper
  h_global_in = np.random.default_rng(1).standard_normal((1, 1, K, 16)).astype(np.float32)
  h_global_out = model.levels[0].decoder(jnp.asarray(h_global_in))[0]
  level, decoder = model.config.levels[0], reference.float64(p["levels"][0]["decoder"])
  (expected,) = reference.decoder([h_global_in[0, 0].astype(np.float64)], decoder, level, model.config)
  close(h_global_out[0, 0], expected)


def test_equation_4_adds_the_projected_slice_to_the_byte_before_in_the_same_patch(paper):
  model, p, x_BT = paper
  local, q = model.levels[1], p["levels"][1]
  w_gl, e_local, positions = (
    np.asarray(a) for a in (q["from_parent"], q["embedder"]["table"], q["embedder"]["positions"])
  )
  assert w_gl.shape == (4, 8)  # D_G x D_L: one matrix for all P slices
  h_global_out = np.random.default_rng(2).standard_normal((2, K, 16)).astype(np.float32)
  patches = x_BT.reshape(2, K, P)
  h_local_in = np.asarray(local.add_parent(local.embedder.slots(patches), jnp.asarray(h_global_out)))
  for b in range(2):
    for k in range(K):
      for j in range(P):
        from_global = h_global_out[b, k, 4 * j : 4 * (j + 1)] @ w_gl
        # Byte positions are ours on top of eq. (4), as the paper's pseudocode has them in both models.
        byte = np.asarray(q["embedder"]["pad"])[0] if j == 0 else e_local[patches[b, k, j - 1]] + positions[j - 1]
        close(h_local_in[b, k, j], from_global + byte)


def test_equation_5_runs_the_same_transformer_over_each_patch_alone(paper):
  model, p, _ = paper
  h_local_in = np.random.default_rng(3).standard_normal((1, K, P, 8)).astype(np.float32)
  h_local_out = np.asarray(model.levels[1].decoder(jnp.asarray(h_local_in))[0])
  level, decoder = model.config.levels[1], reference.float64(p["levels"][1]["decoder"])
  for k in range(K):
    (expected,) = reference.decoder([h_local_in[0, k].astype(np.float64)], decoder, level, model.config)
    close(h_local_out[0, k], expected)


def test_equation_6_ties_the_output_to_the_local_byte_table(paper):
  model, p, _ = paper
  e_local = np.asarray(p["levels"][1]["embedder"]["table"])
  h_local_out = np.random.default_rng(4).standard_normal((3, 8)).astype(np.float32)
  logits = model.levels[1].embedder.logits(jnp.asarray(h_local_out))
  close(logits, h_local_out @ e_local.T)
  shapes = [leaf.shape for leaf in jax.tree.leaves(p)]
  assert shapes.count((25, 8)) == 1 and shapes.count((25, 4)) == 1  # no third table, and no output bias
  assert (25,) not in shapes


@pytest.mark.parametrize("name", variants.every_variant)
def test_whole_model(name):
  config, x_BT = variants.VARIANTS[name], variants.random_bytes(name, 2, seed=5)
  ours = variants.logits(name, x_BT)
  for row, x_T in zip(ours, x_BT, strict=True):
    expected = reference.logits(x_T, variants.parameters(name), config)
    np.testing.assert_allclose(row, expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", variants.every_variant)
def test_every_parameter_matters(name):
  """A parameter without effect could be forgotten, by the model and by its transcription, and no test would see it."""
  p = jax.tree.map(np.asarray, variants.parameters(name))
  x_BT = variants.random_bytes(name, 1, seed=6)
  before = variants.logits(name, x_BT)
  idle = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(p):
    changed = jax.tree_util.tree_map_with_path(lambda q, a, path=path: a + 0.1 * np.sign(a) if q == path else a, p)
    if np.abs(variants.logits(name, x_BT, changed) - before).max() < 1e-3:
      idle.append((jax.tree_util.keystr(path), leaf.shape))
  assert not idle
