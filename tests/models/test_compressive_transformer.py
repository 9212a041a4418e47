"""The Compressive Transformer across segments: its algorithms, what it may see, gradients, decoding and options."""

import dataclasses
import functools
import itertools

import count_products
import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import numpy_compressive as reference
import pytest
from flax import nnx

from megabyte_jax.config import CompressiveTransformerConfig, MeshConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.models import flops
from megabyte_jax.models.build import abstract_model, cast_for_decoding, parameter_info
from megabyte_jax.models.layers.compression import compress_without_parameters
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh, parameter_spec, shard_abstract

T, SEGMENTS = 4, 5
LENGTH = T * SEGMENTS


def config(**options):
  sizes = {"context": T, "width": 8, "num_layers": 2, "num_heads": 2, "memory_length": 4, "compressed_length": 3}
  return CompressiveTransformerConfig(**{**sizes, "vocab_size": 11, "dropout": 0.0, **options})


CONFIGS = {
  "convolution": config(),  # 2 slots come into 3
  "dilated": config(
    compression="dilated_convolution",
    memory_length=8,
    compressed_length=2,
    head_dim=6,
    untie=True,
    clamp_length=7,
    norm_place="pre",
    norm="rmsnorm",
    bias=False,
    qk_norm=True,
    activation="swiglu",
    logit_scale="width",
    tied_output=False,
    scaled_embeddings=False,
  ),
  "most_used": config(compression="most_used", compressed_length=4),
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
  """Logits of whole documents, the memories before each segment, and the losses of each; `fresh` are (segment, row)."""
  rows = np.resize(x_BT, (LENGTH, LENGTH))  # all tests share one compilation
  memory, logits, memories, losses = model(name).empty_memory(LENGTH), [], [], []
  for i in range(SEGMENTS):
    fresh_B = np.array([(i, b) in fresh for b in range(LENGTH)])
    memories.append(memory)
    part, memory, loss = segment_of(name)(parameters(name), memory, rows[:, i * T : (i + 1) * T], fresh_B)
    logits.append(part)
    losses.append(float(loss))
  return np.concatenate(logits, axis=1)[: len(x_BT)], memories, losses


def texts(rows, seed=0):
  return np.random.default_rng(seed).integers(0, 11, (rows, LENGTH)).astype(np.int32)


@pytest.mark.parametrize("name", NAMES)
def test_algorithms(name):
  """Logits and losses against the transcription."""
  x_BT = texts(2, seed=1)
  logits, memories, losses = read(name, x_BT)
  assert np.abs(logits).max() > 1
  expected = [reference.logits_and_losses(x_T, parameters(name), CONFIGS[name]) for x_T in x_BT]
  for row, (logits_TV, _) in zip(logits, expected, strict=True):
    np.testing.assert_allclose(row, logits_TV, atol=1e-4, rtol=1e-4)
  of_rows = (
    LENGTH / 2 * np.sum([losses_of_row for _, losses_of_row in expected], axis=0)
  )  # each text is there ten times
  np.testing.assert_allclose(losses, of_rows, rtol=1e-4)
  segments = CONFIGS[name].memory_length // T
  assert np.flatnonzero(losses).tolist() == ([] if name == "most_used" else list(range(segments, SEGMENTS)))
  filled = [m.filled_B[0].item() for m in memories]
  assert filled == {"convolution": [0, 4, 6, 7, 7], "dilated": [0, 4, 8, 10, 10], "most_used": [0, 4, 6, 8, 8]}[name]


@pytest.mark.parametrize(("kind", "expected"), [("mean", [2.0, 6.0]), ("max", [3.0, 7.0]), ("most_used", [1.0, 7.0])])
def test_compressions_without_parameters(kind, expected):
  old_BLTD = jnp.array([1.0, 3.0, 5.0, 7.0])[None, None, :, None]
  use_BLT = jnp.array([0.3, 0.1, 0.2, 0.9])[None, None]
  np.testing.assert_array_equal(compress_without_parameters(kind, old_BLTD[0], use_BLT[0], 2)[0, :, 0], expected)
  made = nnx.merge(*abstract_model(config(compression=kind)))
  np.testing.assert_array_equal(made._compressed(old_BLTD, use_BLT)[0, 0, :, 0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_reaches_later_ones_and_no_other(name):
  """At every offset, within segments and across them: row s differs at token s alone."""
  seen = np.zeros((LENGTH, LENGTH), bool)
  for seed in range(2):
    x_T = texts(1, seed)[0]
    changed = np.tile(x_T, (LENGTH, 1))
    changed[np.arange(LENGTH), np.arange(LENGTH)] = (x_T + 1 + seed) % 11
    base, after = read(name, np.tile(x_T, (LENGTH, 1)))[0], read(name, changed)[0]
    difference_st = np.abs(after - base).max(axis=-1)
    assert (difference_st[np.tri(LENGTH, dtype=bool)] == 0).all()  # t <= s: not a bit
    seen |= difference_st > 1e-6
  np.testing.assert_array_equal(seen, np.tri(LENGTH, k=-1, dtype=bool).T)


def test_neither_loss_reaches_what_the_other_trains_nor_the_memory():
  name, x_BT = "dilated", texts(LENGTH, seed=3)
  memory = read(name, x_BT)[1][4]
  weight_TV = jnp.asarray(np.random.default_rng(4).standard_normal((T, 11)), jnp.float32)
  graph, numbers = abstract_model(CONFIGS[name])[0], memory[:2]

  def losses(p, numbers):
    logits, after, reconstruction = nnx.merge(graph, p).segment(type(memory)(*numbers, *memory[2:]), x_BT[:, -T:])
    return jnp.sum(logits * weight_TV) + sum(jnp.sum(a) for a in after[:2]), reconstruction

  @jax.jit
  def gradients(p, numbers):
    _, backward = jax.vjp(losses, p, numbers)
    return backward((1.0, 0.0)), backward((0.0, 1.0))

  of_language, of_reconstruction = gradients(parameters(name), numbers)
  for _, of_memory in (of_language, of_reconstruction):
    assert all((leaf == 0).all() for leaf in of_memory) and of_memory[0].size
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_language[0]["compressions"]))
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_reconstruction[0]["transformer"]))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_language[0]["transformer"]["blocks"]))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_reconstruction[0]["compressions"]))


def test_a_longer_row_than_counts_has_the_loss_of_what_counts():
  x_BT = texts(LENGTH, seed=5)
  memory = read("convolution", x_BT)[1][3]
  one = jax.jit(lambda length_B: model("convolution").segment(memory, jnp.asarray(x_BT[:, -T:]), length_B=length_B)[2])
  by_token = [float(one(np.full(LENGTH, n))) for n in range(T + 1)]
  assert by_token[0] == 0 and (np.diff(by_token) > 0).all()
  rows = [float(one(np.where(np.arange(LENGTH) == b, T, 0))) for b in range(3)]
  assert sum(rows) == pytest.approx(float(one(np.where(np.arange(LENGTH) < 3, T, 0))), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_rows_and_no_others_begin_anew(name):
  x_BT = texts(3, seed=5)
  carried = read(name, x_BT)[0]
  logits, memories, _ = read(name, x_BT, fresh={(2, 0), (4, 2)})
  alone = [read(name, np.roll(x_BT, -T * i, axis=1))[0] for i in (2, 4)]
  np.testing.assert_array_equal(logits[1], carried[1])
  np.testing.assert_array_equal(logits[0, 2 * T :], alone[0][0, : 3 * T])
  np.testing.assert_array_equal(logits[2, : 4 * T], carried[2, : 4 * T])
  np.testing.assert_array_equal(logits[2, 4 * T :], alone[1][2, :T])
  assert (np.abs(carried[0, 2 * T :] - logits[0, 2 * T :]).max(axis=-1) > 1e-4).all()
  assert memories[3].filled_B[:3].tolist() == [T, *[memories[3].filled_B[1].item()] * 2]


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_full_pass(name):
  x_BT = texts(2, seed=6)
  expected = read(name, x_BT)[0]
  step, state = jax.jit(model(name).decode_byte), jax.jit(lambda: model(name).start_bytes(2))()
  for t in range(LENGTH):
    state, logits_BV = step(state, jnp.asarray(x_BT[:, t - 1]))
    np.testing.assert_allclose(logits_BV, expected[:, t], atol=1e-4, err_msg=f"token {t}")


@pytest.mark.parametrize("name", ["most_used"])
def test_prompts_are_read_and_continued(name):
  x_BT = texts(2, seed=7)
  expected = read(name, x_BT)[0]
  prompt = jax.jit(lambda known: model(name).read_prompt(jnp.asarray(x_BT), known))
  decode = jax.jit(lambda state: model(name).decode_patch(state, lambda _, t: jnp.take(x_BT, t, axis=1)))
  for known in (0, 1, 6, 8, 11):
    state = prompt(known)
    for t in range(known, LENGTH):
      state, token_B1, logits_B1V = decode(state)
      np.testing.assert_array_equal(token_B1[:, 0], x_BT[:, t])
      np.testing.assert_allclose(logits_B1V[:, 0], expected[:, t], atol=1e-4)


def test_probabilities_of_all_texts_sum_to_one():
  """Over four segments of two tokens, of which the last two see compressed ones."""
  small = config(context=2, memory_length=2, compressed_length=2, vocab_size=2)
  graph, p = abstract_model(small)[0], variants.draw_parameters(small)
  x_BT = np.array(list(itertools.product(range(2), repeat=8)), np.int32)
  memory, log_p_B = nnx.merge(graph, p).empty_memory(len(x_BT)), np.zeros(len(x_BT))
  segment = jax.jit(lambda p, memory, x_BT: nnx.merge(graph, p).segment(memory, x_BT))
  for i in range(0, 8, 2):
    logits, memory, _ = segment(p, memory, x_BT[:, i : i + 2])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    log_p_B += np.take_along_axis(log_p, x_BT[:, i : i + 2, None], axis=-1).sum(axis=(1, 2))
  assert abs(np.exp(log_p_B).sum() - 1) < 1e-5 and np.exp(log_p_B).max() > 4 / len(x_BT)


# --- Options. ---


def gradient_of_both(**options):
  """(jitted (parameters, key) -> (losses, gradient), matrix products in it)."""
  graph = abstract_model(dataclasses.replace(CONFIGS["convolution"], **options))[0]
  x_BT = jnp.asarray(texts(LENGTH, seed=8))
  memory = read("convolution", x_BT)[1][4]

  def loss(p, key):
    cast = jax.tree.map(lambda a, b: a.astype(b.dtype), memory, nnx.merge(graph, p).empty_memory(LENGTH))
    logits, _, reconstruction = nnx.merge(graph, p).segment(cast, x_BT[:, -T:], dropout_key=key)
    return jnp.sum(jax.nn.log_softmax(logits)[..., 0]) + reconstruction

  step = jax.jit(jax.value_and_grad(loss))
  return step, str(step.trace(parameters("convolution"), jax.random.key(0)).jaxpr).count("dot_general")


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.slow
def test_remat_scans_dropout_and_bfloat16():
  p, key, dropping = parameters("convolution"), jax.random.key(0), {"dropout": 0.2, "attention_dropout": 0.1}
  plain, products = gradient_of_both(**dropping)
  loss, gradient = plain(p, key)
  full, products_of_full = gradient_of_both(**dropping, remat="full", scan_layers="never")
  other, other_gradient = full(p, key)
  np.testing.assert_allclose(other, loss, rtol=1e-5)
  np.testing.assert_allclose(flat(other_gradient), flat(gradient), atol=1e-4 * np.abs(flat(gradient)).max())
  assert products < gradient_of_both(**dropping, remat="named")[1] < products_of_full
  assert plain(p, key)[0] == loss and abs(plain(p, jax.random.key(1))[0] - loss) > 0.01
  low, gradient_16 = gradient_of_both(**dropping, compute_dtype="bfloat16")[0](p, key)
  a, b = flat(gradient), flat(gradient_16)
  assert low != loss and abs(low / loss - 1) < 0.05
  assert b.dtype == np.float32 and a @ b / np.sqrt((a @ a) * (b @ b)) > 0.95


def test_decoding_in_bfloat16_as_parameters_are_cast_for_it():
  changed = dataclasses.replace(CONFIGS["convolution"], compute_dtype="bfloat16")
  x_BT, cast = texts(2, seed=9), cast_for_decoding(changed, parameters("convolution"))
  decoder = nnx.merge(abstract_model(changed)[0], cast)
  step, state = jax.jit(decoder.decode_byte), jax.jit(lambda: decoder.start_bytes(2))()
  expected, errors = read("convolution", x_BT)[0], []
  for t in range(3 * T):
    state, logits_BV = step(state, jnp.asarray(x_BT[:, t - 1]))
    errors.append(np.abs(logits_BV - expected[:, t]).max())
  assert 0 < np.mean(errors) < 0.3


def test_meshes_change_nothing_and_matrices_are_spread():
  name, mesh = "dilated", make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
  x_BT, infos = texts(LENGTH, seed=10), parameter_info(CONFIGS[name])
  expected, memories, losses = read(name, x_BT)
  abstract = shard_abstract(abstract_model(CONFIGS[name])[1], infos, mesh)
  with jax.set_mesh(mesh):
    spread = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), parameters(name), abstract)
    rows = jax.device_put((memories[3], x_BT[:, 3 * T : 4 * T], np.zeros(LENGTH, bool)), batch_sharding(mesh))
    logits, memory, loss = segment_of(name)(spread, *rows)
  np.testing.assert_allclose(logits, expected[:, 3 * T : 4 * T], atol=1e-4)
  np.testing.assert_allclose(loss, losses[3], rtol=1e-4)
  for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(memories[4]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    info = infos[jax.tree_util.keystr(path, simple=True, separator=".")]
    assert info.kind not in ("matrix", "convolution") or any(parameter_spec(info, leaf.shape, mesh))


def test_evaluation_may_have_longer_memories():
  longer = dataclasses.replace(CONFIGS["convolution"], evaluation_memory_length=8, evaluation_compressed_length=9)
  used = longer.for_evaluation
  assert (used.memory_length, used.compressed_length) == (8, 9)
  assert abstract_model(used)[1].keys() == parameters("convolution").keys()
  memory = nnx.merge(abstract_model(used)[0], parameters("convolution")).empty_memory(2)
  assert memory.inputs_BLMD.shape == (2, 2, 8, 8) and memory.compressed_BLCD.shape == (2, 2, 9, 8)


# --- Counts. ---


@pytest.mark.parametrize("name", [*NAMES, "mean"])
def test_counts_are_the_models(name):
  counted = CONFIGS.get(name) or config(compression="mean")
  graph, p = abstract_model(counted)
  assert sum(leaf.size for leaf in jax.tree.leaves(p)) == counted.parameter_count()

  def read_one(p, x_BT):
    one = nnx.merge(graph, p)
    return one.segment(one.empty_memory(1), x_BT)

  found = count_products.operations(read_one, p, jax.ShapeDtypeStruct((1, T), jnp.int32))
  heads, keys = counted.num_heads * counted.level.heads[1], counted.memory_length + counted.compressed_length + T
  of_distances = 2 * counted.num_layers * keys * counted.width * heads  # all rows share them
  expected = T * flops.flops_per_byte(counted, attention="dense") + of_distances
  assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"memory_length": 6}, "model.memory_length is 6; the memory holds whole segments"),
    ({"memory_length": 0}, "model.memory_length is 0"),
    ({"evaluation_memory_length": 5}, "model.evaluation_memory_length is 5"),
    ({"compression_rate": 3}, "model.context 4 is not a multiple of model.compression_rate 3"),
    ({"compressed_length": 0}, "model.compressed_length is 0"),
    ({"attention": "splash"}, "model.attention=splash has no relative positions"),
    ({"compression": "gzip"}, "compression is 'gzip'; choose one of"),
  ],
)
def test_impossible_sizes_are_one_line(options, message):
  with pytest.raises(ConfigError, match=message):
    config(**options)
