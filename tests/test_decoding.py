"""Decoding with caches gives each byte the probability that the full forward pass gives it."""

import dataclasses
import functools
import math
import pathlib
import re
import resource

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import pytest
from flax import nnx

from megabyte_jax import plan, windows
from megabyte_jax import sampling as sampling_module
from megabyte_jax.config import Config, ConfigError, Level, MegabyteConfig, MeshConfig
from megabyte_jax.models.build import abstract_model, in_compute_dtype, make_model
from megabyte_jax.sampling import Sampling, generate, pick_byte
from megabyte_jax.sharding import make_mesh, shard_abstract

pytestmark = pytest.mark.usefixtures("quick_compile")


def nats_of(logits_BTV, x_BT):
  """float64 -ln p of each byte."""
  logits_BTV = np.asarray(logits_BTV, np.float64)
  log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
  return -np.take_along_axis(log_p_BTV, x_BT[..., None], axis=-1)[..., 0]


@functools.cache
def latent_logits(name):
  """The jitted forward pass of a PerceiverAR with its latents at any place."""
  graph = abstract_model(variants.VARIANTS[name])[0]
  return jax.jit(lambda p, x_BT, start_B: nnx.merge(graph, p)(x_BT, start_B=start_B))


def nats_by_plan(name, texts):
  """[texts, n], of every byte, by full forward passes over the windows of the sliding evaluation."""
  config = variants.VARIANTS[name]
  B, length = texts.shape
  nats, counted = np.zeros(texts.shape), np.zeros(length, int)
  for w in windows.plan(length, config, "sliding"):
    x_BT = np.zeros((B, config.context), np.int32)
    x_BT[:, : w.length] = texts[:, w.start : w.start + w.length]
    mask = windows.scored_mask(w)
    if variants.is_perceiver(config):
      start = min(w.latent_start, config.context - config.latents)
      window_nats = np.zeros(x_BT.shape)
      latents = slice(start, start + config.latents)
      logits_BNV = latent_logits(name)(variants.parameters(name), x_BT, np.full(B, start))
      window_nats[:, latents] = nats_of(logits_BNV, x_BT[:, latents])
    else:
      window_nats = nats_of(variants.logits(name, x_BT), x_BT)
    nats[:, w.start : w.start + w.length][:, mask] = window_nats[:, : w.length][:, mask]
    counted[w.start : w.start + w.length][mask] += 1
  assert (counted == 1).all()
  return nats


@pytest.mark.parametrize("name", variants.every_variant)
def test_generated_bytes_have_the_nats_of_the_full_forward_pass(name):
  """From no prompt, and from prompts that end anywhere: within a patch, at its end, just before the context's."""
  model, config = variants.model(name), variants.VARIANTS[name]
  text, size = variants.random_bytes(name, 1, seed=7)[0], config.context
  made = [generate(model, text[:known].astype(np.uint8).tobytes(), size - known, seed=known) for known in range(size)]
  whole = np.stack([np.concatenate([text[: size - m.bytes_.shape[1]], m.bytes_[0]]) for m in made])
  expected = nats_by_plan(name, whole)
  for known in range(size):
    np.testing.assert_allclose(made[known].nats[0], expected[known, known:], atol=1e-4, err_msg=f"{known} bytes known")


@pytest.mark.parametrize("name", variants.every_variant)
def test_generation_past_the_context_has_the_nats_of_sliding_evaluation(name):
  model, config = variants.model(name), variants.VARIANTS[name]
  prompt = variants.random_bytes(name, 1, seed=8)[0, :3].astype(np.uint8).tobytes()
  made = generate(model, prompt, 3 * config.context, seed=1)
  whole = np.concatenate([np.frombuffer(prompt, np.uint8), made.bytes_[0]])
  np.testing.assert_allclose(made.nats[0], nats_by_plan(name, np.stack([whole] * config.context))[0, 3:], atol=1e-4)
  assert len(np.unique(made.bytes_)) > 4  # a text that only repeats a byte would not notice a shifted cache
  # A prompt longer than the context goes on where the whole text does.
  cut = 2 * config.context + 5
  again = generate(model, whole[:cut].astype(np.uint8).tobytes(), len(whole) - cut, seed=1)
  np.testing.assert_array_equal(again.bytes_[0], whole[cut:])


@pytest.mark.parametrize("name", ["three_levels_cross_patch", "without_local", "perceiver_ar_rotary"])
def test_logits_of_decoding_are_those_of_the_full_forward_pass(name):
  """All of them, not only the picked byte's, for two rows side by side."""
  config, x_BT = variants.VARIANTS[name], variants.random_bytes(name, 2, seed=9)
  model = variants.model(name)
  first = config.context - config.latents if variants.is_perceiver(config) else 0
  patch = 1 if variants.is_perceiver(config) else config.levels[0].patch_size

  @jax.jit
  def read(known):
    where = (known, first) if variants.is_perceiver(config) else (known,)
    return model.read_prompt(jnp.asarray(x_BT), *where)

  @jax.jit
  def decode(state):
    return model.decode_patch(state, lambda logits_BV, t: jnp.take(jnp.asarray(x_BT), t, axis=1))

  expected = variants.logits(name, x_BT)
  for known in range(first, config.context, 3 * patch):
    state = read(known)
    for t in range(known, config.context, patch):
      state, bytes_BS, logits_BSV = decode(state)
      np.testing.assert_array_equal(bytes_BS, x_BT[:, t : t + patch])
      np.testing.assert_allclose(logits_BSV, expected[:, t - first : t - first + patch], atol=1e-4)
    assert int(state.position) == config.context


@pytest.mark.parametrize("name", variants.every_variant)
def test_logits_of_single_bytes_are_those_of_the_full_forward_pass(name):
  """Where each byte is given from outside, as in decompression."""
  config, x_BT, model = variants.VARIANTS[name], variants.random_bytes(name, 2, seed=9), variants.model(name)
  first = config.context - config.latents if variants.is_perceiver(config) else 0
  if variants.is_perceiver(config):
    state = model.read_prompt(jnp.asarray(x_BT), first, first)
  else:
    state = model.start_bytes(2)
  step = jax.jit(model.decode_byte, static_argnums=2)
  expected = variants.logits(name, x_BT)
  for t in range(first, config.context):
    state, logits_BV = step(state, jnp.asarray(x_BT[:, t - 1]), model.first_level_at(t))
    np.testing.assert_allclose(logits_BV, expected[:, t - first], atol=1e-4, err_msg=f"byte {t}")


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_samples():
  model, lengths = variants.model("without_global_cross_patch"), 40
  one, three, eight = (generate(model, b"\3\1", lengths, num_samples=n, seed=5).bytes_ for n in (1, 3, 8))
  np.testing.assert_array_equal(one, eight[:1])
  np.testing.assert_array_equal(three, eight[:3])
  assert len(np.unique(eight, axis=0)) == 8
  assert (generate(model, b"\3\1", lengths, seed=6).bytes_ != one).any()


def test_the_randomness_of_a_byte_depends_on_its_place_alone():
  """With all bytes equally probable, only the draws are left to see."""
  name = "without_global_cross_patch"
  model = nnx.merge(abstract_model(variants.VARIANTS[name])[0], jax.tree.map(jnp.zeros_like, variants.parameters(name)))
  text = generate(model, b"", 64, seed=3).bytes_[0]
  for start in (3, 21):
    np.testing.assert_array_equal(generate(model, bytes(start), 64 - start, seed=3).bytes_[0], text[start:])
  for period in range(1, 33):  # the place in the text, not in the window: nothing comes again when the window moves
    assert (text[period:] == text[:-period]).mean() < 0.4


@pytest.mark.parametrize("name", ["three_levels_cross_patch", "conv"])
def test_prompts_are_read_in_buffers_that_fit(monkeypatch, name):
  model, config = variants.model(name), variants.VARIANTS[name]
  prompt = variants.random_bytes(name, 1, seed=4)[0, :5].astype(np.uint8).tobytes()
  expected = generate(model, prompt, config.context, seed=2)
  monkeypatch.setattr(sampling_module, "_PROMPT_BYTES", 1)
  lengths = [sampling_module._prompt_length(known, model) for known in range(config.context)]
  assert all(known <= length <= config.context for known, length in enumerate(lengths))
  assert len(set(lengths)) > 1 and not any(length % model.alignment for length in lengths)
  made = generate(model, prompt, config.context, seed=2)
  np.testing.assert_array_equal(made.bytes_, expected.bytes_)
  np.testing.assert_allclose(made.nats, expected.nats, atol=1e-4)


def test_samples_stop_at_bytes_and_where_a_function_says(monkeypatch):
  monkeypatch.setattr(sampling_module, "_CHUNK_BYTES", 4)
  model, pieces = variants.model("without_local"), []
  whole = generate(model, b"\3\1", 40, num_samples=3, seed=5).bytes_
  for length in (2, 1, 3):
    stop = whole[1, 12 : 12 + length].tobytes()
    ends = [row.tobytes().find(stop) + length for row in whole]
    ends = [end if end >= length else 40 for end in ends]
    made = generate(model, b"\3\1", 40, num_samples=3, seed=5, stop=stop)
    np.testing.assert_array_equal(made.lengths, ends)
    assert made.bytes_.shape == made.nats.shape == (3, max(ends))
    for row, text, end in zip(made.bytes_, whole, ends, strict=True):
      np.testing.assert_array_equal(row[:end], text[:end])
  stop = lambda text: text.index(whole[0, 9]) + 1 if whole[0, 9] in text else None  # noqa: E731
  made = generate(model, b"\3\1", 40, seed=5, stop=stop, on_bytes=lambda new: pieces.append(new.copy()))
  assert made.lengths[0] == whole[0].tolist().index(whole[0, 9]) + 1
  np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], whole[0, : made.lengths[0]])
  assert generate(model, b"\3\1", 40, stop=lambda text: 0).bytes_.shape == (1, 0)
  # The prompt does not count, not even together with what follows it.
  after = whole[0, :1].tobytes()
  assert generate(model, b"\3\1", 40, seed=5, stop=b"\1" + after).lengths[0] != 1
  with pytest.raises(ConfigError, match="stop at are empty"):
    generate(model, stop=b"")


@pytest.mark.parametrize("name", ["rmsnorm_without_bias", "perceiver_ar"])
def test_parameters_are_cast_once_to_the_same_results(name):
  """Norms keep theirs in float32; of the others nothing is used but what the cast leaves."""
  config = dataclasses.replace(variants.VARIANTS[name], compute_dtype="bfloat16")
  graph, parameters = abstract_model(config)[0], variants.parameters(name)
  cast = in_compute_dtype(config, parameters)
  kinds = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(cast)}
  assert all((dtype == jnp.float32) == ("norm" in path) for path, dtype in kinds.items())
  assert all(
    leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(in_compute_dtype(variants.VARIANTS[name], parameters))
  )
  # Rounded here and not by the model, because XLA leaves out roundings within a computation on CPU.
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cast)
  x_BT = variants.random_bytes(name, 2, seed=9)
  forward = jax.jit(lambda p: nnx.merge(graph, p)(x_BT))
  np.testing.assert_array_equal(forward(cast), forward(rounded))
  step = jax.jit(lambda p: nnx.merge(graph, p).read_prompt(jnp.asarray(x_BT), 4))
  jax.tree.map(np.testing.assert_array_equal, step(cast), step(rounded))
  np.testing.assert_allclose(forward(cast), forward(parameters), atol=0.2)


@pytest.mark.parametrize(
  ("name", "axes"),
  [
    ("transformer", {"fsdp": 8}),
    ("cross_patch", {"fsdp": 2, "seq": 2, "tensor": 2}),
    ("perceiver_ar", {"data": 4, "tensor": 2}),
  ],
  ids=str,
)
def test_generation_with_parameters_spread_over_a_mesh(name, axes):
  config = variants.VARIANTS[name]
  mesh = make_mesh(MeshConfig(**{"data": 1} | axes))
  graph, abstract = abstract_model(config)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shard_abstract(abstract, mesh))
  spread = nnx.merge(graph, jax.device_put(variants.parameters(name), shardings))
  options = dict(num_bytes=config.context + 3, num_samples=3, seed=4)  # past the context, more rows than asked for
  expected = generate(variants.model(name), b"\3\1\2", **options)
  made = generate(spread, b"\3\1\2", **options)
  np.testing.assert_array_equal(made.bytes_, expected.bytes_)
  np.testing.assert_allclose(made.nats, expected.nats, atol=1e-4)


def test_decoding_on_a_mesh_moves_activations_and_no_parameters():
  levels = (
    Level(patch_size=8, width=256, num_layers=2, num_heads=4),
    Level(patch_size=1, width=128, num_layers=2, num_heads=4),
  )
  model = MegabyteConfig(context=64, levels=levels)
  config = Config(model=model, batch_size=8, num_steps=1, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
  program = plan.lower(config, make_mesh(config.mesh), "generate").compile().as_text()
  moved = re.findall(r" = \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter)\(", program)
  assert len(moved) > 4
  assert max(math.prod(map(int, shape.split(","))) for shape in moved) <= 8 * 8 * 256  # the logits of a patch
  assert 8 * 8 * 256 < 128 * 3 * 128  # the smallest of the large parameters


def test_bytes_come_as_they_are_made(monkeypatch):
  """In chunks, with the state carried from one to the next."""
  monkeypatch.setattr(sampling_module, "_CHUNK_BYTES", 4)
  name, pieces = "without_local", []
  made = generate(
    variants.model(name), b"\3\1", 30, num_samples=2, seed=5, on_bytes=lambda new: pieces.append(new.copy())
  )
  assert len(pieces) >= 8 and max(piece.shape[1] for piece in pieces) <= 4
  np.testing.assert_array_equal(np.concatenate(pieces, axis=1), made.bytes_)
  whole = np.concatenate([np.tile(np.uint8([[3, 1]]), (2, 1)), made.bytes_], axis=1)
  np.testing.assert_allclose(made.nats, nats_by_plan(name, whole)[:, 2:], atol=1e-4)


@pytest.mark.slow
def test_a_million_bytes_in_one_call_and_bounded_memory():
  """An image of 640 x 640 pixels, the largest of Table 5, by a tiny model, through all of its context."""
  size = 640 * 640 * 3
  levels = (
    Level(patch_size=192, width=192, num_layers=2, num_heads=2),
    Level(patch_size=1, width=16, num_layers=1, num_heads=1),
  )
  model, held, pieces = make_model(MegabyteConfig(context=size, levels=levels), nnx.Rngs(0)), [], []

  def on_bytes(new):
    pieces.append(new.size)
    if len(pieces) % 500 == 100:  # compiled, and warm
      held.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

  made = generate(model, b"", size, on_bytes=on_bytes)
  assert made.bytes_.shape == (1, size) and sum(pieces) == size
  assert np.isfinite(made.nats).all() and len(np.unique(made.bytes_[0, -1000:])) > 100
  assert max(held) - held[0] < 200e6


def distribution(logits, sampling):
  """What sampling should draw from, with Python's sorting; float64 [V]."""
  logits = np.asarray(logits, np.float64) / sampling.temperature
  order = sorted(range(len(logits)), key=lambda v: -logits[v])
  kept = order[: sampling.top_k or None]
  p = np.zeros(len(logits))
  p[kept] = np.exp(logits[kept] - logits.max())
  p /= p.sum()
  reached, nucleus = 0.0, []
  for v in kept:
    if reached < sampling.top_p:
      nucleus.append(v)
    reached += p[v]
  return np.where(np.isin(np.arange(len(logits)), nucleus), p, 0) / p[nucleus].sum()


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(top_k=1),
    Sampling(top_k=3),
    Sampling(top_k=100),
    Sampling(top_p=0.5),
    Sampling(top_p=0.9),
    Sampling(top_p=0.01),
    Sampling(temperature=1.5, top_k=5, top_p=0.7),
  ],
  ids=str,
)
def test_pick_byte_draws_from_the_asked_distribution(sampling):
  logits_V = np.random.default_rng(3).standard_normal(12).astype(np.float32) * 1.5
  expected, draws = distribution(logits_V, sampling), 20_000
  keys = jax.random.split(jax.random.key(0), draws)
  picked = jax.jit(jax.vmap(lambda key: pick_byte(jnp.asarray(logits_V), key, sampling)))(keys)
  share = np.bincount(np.asarray(picked), minlength=12) / draws
  assert (share[expected == 0] == 0).all()
  assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12).all()


def test_temperature_zero_picks_the_most_probable_byte():
  logits_V = jnp.asarray([0.3, 2.0, -1.0, 1.9])
  assert {int(pick_byte(logits_V, jax.random.key(s), Sampling(temperature=0))) for s in range(50)} == {1}
  assert (
    generate(variants.model("two_levels"), b"\2", 9, sampling=Sampling(temperature=0), seed=1).bytes_
    == (generate(variants.model("two_levels"), b"\2", 9, sampling=Sampling(temperature=0), seed=2).bytes_)
  ).all()


@pytest.mark.parametrize("name", ["short_cross_patch", "without_global", "perceiver_ar"])
def test_logits_of_a_prefix_are_the_prefix_of_the_logits(name):
  """At every length up to two patches: within the first one, within the second, and with whole ones."""
  config = dataclasses.replace(variants.VARIANTS[name], context=8)
  graph, parameters = abstract_model(config)[0], variants.draw_parameters(config)
  forward = jax.jit(lambda p, x_BT: nnx.merge(graph, p)(x_BT))
  x_BT = variants.random_bytes(name, 3, seed=10)[:, :8]
  expected = forward(parameters, x_BT)
  for length in range(1, 8):
    logits_BTV = forward(parameters, x_BT[:, :length])
    assert logits_BTV.shape == (3, length, config.vocab_size)
    np.testing.assert_allclose(logits_BTV, expected[:, :length], atol=5e-5)
