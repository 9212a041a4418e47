"""The Block-Recurrent Transformer across segments: its equations, what it may see, its gradients, decoding, options."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import numpy_block_recurrent as reference
import pytest
from flax import nnx

from megabyte_jax.config import BlockRecurrentConfig, MeshConfig
from megabyte_jax.models.build import abstract_model, cast_for_decoding, parameter_info
from megabyte_jax.models.layers import cross_entropy
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh, parameter_spec, shard_abstract
from megabyte_jax.training.muon import Matrices

T, SEGMENTS = 8, 3
LENGTH = T * SEGMENTS


def config(**options):
  sizes = {"context": T, "window": 4, "states": 3, "width": 8, "num_layers": 2, "num_heads": 2}
  return BlockRecurrentConfig(**{**sizes, "vocab_size": 11, "dropout": 0.0, "recurrent_layers": (-1,), **options})


CONFIGS = {
  "fixed": config(tied_output=False),  # its last layer is recurrent: what tokens read of states reaches no later key
  "lstm": config(
    gate="lstm",
    skip=False,
    num_layers=3,
    recurrent_layers=(0, -2),
    head_dim=6,
    norm="rmsnorm",
    bias=False,
    activation="swiglu",
    logit_scale="width",
  ),
}
NAMES = list(CONFIGS)


@functools.cache
def parameters(name):
  return variants.draw_parameters(CONFIGS[name])


@functools.cache
def segment_of(name):
  graph = abstract_model(CONFIGS[name])[0]
  return jax.jit(lambda p, memory, x_BT, fresh_B: nnx.merge(graph, p).segment(memory, x_BT, fresh_B=fresh_B))


@functools.cache
def model(name):
  return nnx.merge(abstract_model(CONFIGS[name])[0], parameters(name))


def read(name, x_BT, fresh=()):
  """Logits of LENGTH rows of whole documents, and the memories before each segment; `fresh` are (segment, row)."""
  rows = np.resize(x_BT, (LENGTH, LENGTH))  # all tests share one compilation
  memory, logits, memories = model(name).empty_memory(LENGTH), [], []
  for i in range(SEGMENTS):
    fresh_B = np.array([(i, b) in fresh for b in range(LENGTH)])
    memories.append(memory)
    part, memory, extra = segment_of(name)(parameters(name), memory, rows[:, i * T : (i + 1) * T], fresh_B)
    logits.append(part)
    assert extra == 0
  return np.concatenate(logits, axis=1)[: len(x_BT)], memories


def texts(rows, seed=0):
  return np.random.default_rng(seed).integers(0, 11, (rows, LENGTH)).astype(np.int32)


@pytest.mark.parametrize("name", NAMES)
def test_equations(name):
  """Against the transcription, which reads a document as a whole: what a memory loses would differ."""
  x_BT = texts(2, seed=1)
  logits, _ = read(name, x_BT)
  assert np.abs(logits).max() > 1
  for row, x_T in zip(logits, x_BT, strict=True):
    np.testing.assert_allclose(row, reference.logits(x_T, parameters(name), CONFIGS[name]), atol=5e-5, rtol=5e-5)


def test_far_tokens_share_buckets():
  """Distances up to 150 within a window of 160, which the tiny models above do not have."""
  wide = config(context=160, window=160, num_layers=1)
  p, x_BT = variants.draw_parameters(wide), np.random.default_rng(2).integers(0, 11, (1, 160))
  graph = abstract_model(wide)[0]
  logits = jax.jit(lambda p, x_BT: nnx.merge(graph, p)(x_BT))(p, jnp.asarray(x_BT))
  np.testing.assert_allclose(logits[0], reference.logits(x_BT[0], p, wide), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_reaches_all_later_ones_and_no_other(name):
  """At every offset, within segments and across them: row s differs at token s alone."""
  seen = np.zeros((LENGTH, LENGTH), bool)
  for seed in range(2):
    x_T = texts(1, seed)[0]
    changed = np.tile(x_T, (LENGTH, 1))
    changed[np.arange(LENGTH), np.arange(LENGTH)] = (x_T + 1 + seed) % 11
    base, (after, _) = read(name, np.tile(x_T, (LENGTH, 1)))[0], read(name, changed)
    difference_st = np.abs(after - base).max(axis=-1)
    assert (difference_st[np.tri(LENGTH, dtype=bool).T == 0] == 0).all()  # t < s: not a bit
    assert (np.diagonal(difference_st) == 0).all()
    seen |= difference_st > 1e-6
  np.testing.assert_array_equal(seen, np.tri(LENGTH, k=-1, dtype=bool).T)


def test_gradients_stop_where_a_segment_begins_and_not_between_its_windows():
  name, x_BT = "fixed", texts(LENGTH, seed=3)
  memory = read(name, x_BT)[1][1]
  weight_TV = jnp.asarray(np.random.default_rng(4).standard_normal((4, 11)), jnp.float32)
  graph, numbers = abstract_model(CONFIGS[name])[0], jax.tree.leaves(memory)[2:]

  @jax.jit
  def gradients(p, numbers, fresh_B):
    def of_last_window(p, numbers):
      before = type(memory)(*memory[:2], *numbers)
      logits, _, _ = nnx.merge(graph, p).segment(before, x_BT[:, :T], fresh_B=fresh_B)
      return jnp.sum(logits[:, 4:] * weight_TV)

    return jax.grad(of_last_window, argnums=(0, 1))(p, numbers)

  of_p, of_memory = gradients(parameters(name), numbers, np.zeros(LENGTH, bool))
  assert all((leaf == 0).all() for leaf in of_memory) and all(leaf.size for leaf in of_memory)
  assert (of_p["cells"]["first"] == 0).all()
  # Changed states are what the last window reads: the gradient comes through the end of the window before.
  assert all(np.abs(of_cell).max() > 0 for leaf in jax.tree.leaves(of_p["cells"]["gate"]) for of_cell in leaf)
  of_p, of_memory = gradients(parameters(name), numbers, np.arange(LENGTH) == 1)
  assert all((leaf == 0).all() for leaf in of_memory)
  assert all(np.abs(first).max() > 0 for first in of_p["cells"]["first"])  # the first states, through a window


@pytest.mark.parametrize("name", NAMES)
def test_fresh_rows_and_no_others_begin_anew(name):
  x_BT = texts(3, seed=5)
  carried, _ = read(name, x_BT)
  logits, _ = read(name, x_BT, fresh={(1, 0), (2, 2)})
  alone = [read(name, np.roll(x_BT, -T * i, axis=1))[0][:, :T] for i in range(SEGMENTS)]
  np.testing.assert_array_equal(logits[1], carried[1])
  np.testing.assert_array_equal(logits[0, T : 2 * T], alone[1][0])
  np.testing.assert_array_equal(logits[2, : 2 * T], carried[2, : 2 * T])
  np.testing.assert_array_equal(logits[2, 2 * T :], alone[2][2])
  assert (np.abs(carried[0, T:] - logits[0, T:]).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_full_pass(name):
  x_BT = texts(2, seed=6)
  expected, _ = read(name, x_BT)
  step, state = jax.jit(model(name).decode_byte), jax.jit(lambda: model(name).start_bytes(2))()
  for t in range(LENGTH):
    state, logits_BV = step(state, jnp.asarray(x_BT[:, t - 1]))
    np.testing.assert_allclose(logits_BV, expected[:, t], atol=1e-4, err_msg=f"token {t}")


def test_prompts_are_read_and_continued():
  x_BT = texts(2, seed=7)
  expected, _ = read("lstm", x_BT)
  prompt = jax.jit(lambda known: model("lstm").read_prompt(jnp.asarray(x_BT), known))
  decode = jax.jit(lambda state: model("lstm").decode_patch(state, lambda _, t: jnp.take(x_BT, t, axis=1)))
  for known in (0, 1, 7, 8, 17):
    state = prompt(known)
    for t in range(known, min(known + 5, LENGTH)):
      state, token_B1, logits_B1V = decode(state)
      np.testing.assert_array_equal(token_B1[:, 0], x_BT[:, t])
      np.testing.assert_allclose(logits_B1V[:, 0], expected[:, t], atol=1e-4)


def test_probabilities_of_all_texts_sum_to_one():
  small = dataclasses.replace(CONFIGS["lstm"], context=4, window=2, vocab_size=2)
  graph, p = abstract_model(small)[0], variants.draw_parameters(small)
  x_BT = np.array(list(itertools.product(range(2), repeat=8)), np.int32)
  memory, log_p_B = nnx.merge(graph, p).empty_memory(len(x_BT)), np.zeros(len(x_BT))
  segment = jax.jit(lambda p, memory, x_BT: nnx.merge(graph, p).segment(memory, x_BT))
  for i in (0, 4):
    logits, memory, _ = segment(p, memory, x_BT[:, i : i + 4])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    log_p_B += np.take_along_axis(log_p, x_BT[:, i : i + 4, None], axis=-1).sum(axis=(1, 2))
  assert abs(np.exp(log_p_B).sum() - 1) < 1e-5 and np.exp(log_p_B).max() > 4 / len(x_BT)


def test_logits_of_a_large_vocabulary_are_never_there_together(monkeypatch):
  large = config(vocab_size=300)
  graph, p = abstract_model(large)[0], variants.draw_parameters(large)
  x_BT = jnp.asarray(np.random.default_rng(11).integers(0, 300, (2, T)))

  def traced():
    def nats(p, x_BT):
      one = nnx.merge(graph, p)
      return one.segment_nats(one.empty_memory(2), x_BT)[0]

    return jax.jit(nats).trace(p, x_BT)

  whole = traced()
  monkeypatch.setattr(cross_entropy, "_LOGITS", 1 << 10)
  parts = traced()
  assert "f32[2,8,300]" in str(whole.jaxpr) and "f32[2,8,300]" not in str(parts.jaxpr)
  expected, found = (program.lower().compile()(p, x_BT) for program in (whole, parts))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- Options. ---


DROPPING = {"dropout": 0.2, "attention_dropout": 0.1}
SMALL = dataclasses.replace(CONFIGS["lstm"], num_layers=2, recurrent_layers=(1,), **DROPPING)


@functools.cache
def loss_and_gradient(**options):
  changed = dataclasses.replace(SMALL, **options)
  graph, x_BT = abstract_model(changed)[0], jnp.asarray(texts(2, seed=8)[:, :T])

  def loss(p, key):
    log_p = jax.nn.log_softmax(nnx.merge(graph, p)(x_BT, dropout_key=key))
    return -jnp.sum(jnp.take_along_axis(log_p, x_BT[..., None], axis=-1))

  step = jax.jit(jax.value_and_grad(loss))
  return step, str(step.trace(small_parameters(), jax.random.key(0)).jaxpr).count("dot_general")


@functools.cache
def small_parameters():
  return variants.draw_parameters(SMALL)


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.slow
def test_remat_and_scan_change_the_program_and_not_the_gradients():
  key, (plain, products) = jax.random.key(0), loss_and_gradient()
  loss, gradient = plain(small_parameters(), key)
  step, products_of_full = loss_and_gradient(remat="full", scan_layers="never")
  other, other_gradient = step(small_parameters(), key)
  np.testing.assert_allclose(other, loss, rtol=1e-6)
  np.testing.assert_allclose(flat(other_gradient), flat(gradient), atol=1e-4)
  assert products < loss_and_gradient(remat="named")[1] < products_of_full
  again, other = plain(small_parameters(), key)[0], plain(small_parameters(), jax.random.key(1))[0]
  assert again == loss and abs(other - loss) > 0.01  # dropout is a function of the key


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
  key = jax.random.key(0)
  exact, gradient = loss_and_gradient()[0](small_parameters(), key)
  loss, gradient_16 = loss_and_gradient(compute_dtype="bfloat16")[0](small_parameters(), key)
  assert loss != exact and abs(loss / exact - 1) < 0.02
  a, b = flat(gradient), flat(gradient_16)
  assert b.dtype == np.float32 and a @ b / np.sqrt((a @ a) * (b @ b)) > 0.97


def test_decoding_in_bfloat16_as_parameters_are_cast_for_it():
  changed = dataclasses.replace(CONFIGS["fixed"], compute_dtype="bfloat16")
  x_BT, cast = texts(2, seed=9), cast_for_decoding(changed, parameters("fixed"))
  decoder = nnx.merge(abstract_model(changed)[0], cast)
  step, state = jax.jit(decoder.decode_byte), jax.jit(lambda: decoder.start_bytes(2))()
  expected, errors = read("fixed", x_BT)[0], []
  for t in range(2 * T):
    state, logits_BV = step(state, jnp.asarray(x_BT[:, t - 1]))
    errors.append(np.abs(logits_BV - expected[:, t]).max())
  assert 0 < np.mean(errors) < 0.1


def test_meshes_change_nothing_and_matrices_are_spread():
  name, mesh = "lstm", make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
  x_BT, infos = texts(LENGTH, seed=10), parameter_info(CONFIGS[name])
  expected, memories = read(name, x_BT)
  abstract = shard_abstract(abstract_model(CONFIGS[name])[1], infos, mesh)
  with jax.set_mesh(mesh):
    spread = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), parameters(name), abstract)
    rows = jax.device_put((memories[1], x_BT[:, T : 2 * T], np.zeros(LENGTH, bool)), batch_sharding(mesh))
    logits, memory, _ = segment_of(name)(spread, *rows)
  np.testing.assert_allclose(logits, expected[:, T : 2 * T], atol=1e-4)
  for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(memories[2]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    info = infos[jax.tree_util.keystr(path, simple=True, separator=".")]
    assert info.kind != "matrix" or any(parameter_spec(info, leaf.shape, mesh))


def test_muons_matrices_of_an_lstms_gate():
  """From both attentions' heads to the input and the forget gate, each a matrix of its own."""
  info, shape = parameter_info(CONFIGS["lstm"])["cells.gate.gates.kernel"], (2, 2, 2, 6, 2, 8)
  assert abstract_model(CONFIGS["lstm"])[1]["cells"]["gate"]["gates"]["kernel"].shape == shape
  assert Matrices.of(shape, info) == ((0, 4), (1, 2, 3), (5,), 2 * 2, 2 * 2 * 6, 8)
