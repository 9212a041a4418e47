"""Decoding with caches gives each byte the probability that the full forward pass gives it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.evaluation import windows
from megabyte_jax.generation import sampling as sampling_module
from megabyte_jax.generation.sampling import Sampling, generate, gumbel_noise, pick_byte
from megabyte_jax.models.build import abstract_model


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
  for w in windows.windows_of(length, config, "sliding"):
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


@pytest.mark.parametrize("name", variants.every_variant_in_time)
def test_generated_bytes_have_the_nats_of_the_full_forward_pass(name):
  """From no prompt, and from prompts that end anywhere: within a patch, at its end, just before the context's."""
  model, config = variants.model(name), variants.VARIANTS[name]
  text, size = variants.random_bytes(name, 1, seed=7)[0], config.context
  made = [generate(model, text[:known].astype(np.uint8).tobytes(), size - known, seed=known) for known in range(size)]
  whole = np.stack([np.concatenate([text[: size - m.bytes_.shape[1]], m.bytes_[0]]) for m in made])
  expected = nats_by_plan(name, whole)
  for known in range(size):
    np.testing.assert_allclose(made[known].nats[0], expected[known, known:], atol=1e-4, err_msg=f"{known} bytes known")


@pytest.mark.parametrize("name", variants.every_variant_in_time)
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


@pytest.mark.parametrize("name", variants.every_variant_in_time)
def test_logits_of_single_bytes_are_those_of_the_full_forward_pass(name):
  """Where each byte is given from outside, as in decompression."""
  config, x_BT, model = variants.VARIANTS[name], variants.random_bytes(name, 2, seed=9), variants.model(name)
  first = config.context - config.latents if variants.is_perceiver(config) else 0
  if variants.is_perceiver(config):
    state = jax.jit(model.read_prompt, static_argnums=(1, 2))(jnp.asarray(x_BT), first, first)
  else:
    state = jax.jit(model.start_bytes, static_argnums=0)(2)
  step = jax.jit(model.decode_byte, static_argnums=2)
  expected = variants.logits(name, x_BT)
  for t in range(first, config.context):
    state, logits_BV = step(state, jnp.asarray(x_BT[:, t - 1]), model.first_level_at(t))
    np.testing.assert_allclose(logits_BV, expected[:, t - first], atol=1e-4, err_msg=f"byte {t}")


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


@pytest.mark.parametrize(
  "name", ["without_local", "conv", "cross_patch", "three_levels_cross_patch", "without_global_cross_patch_conv"]
)
def test_bytes_come_as_they_are_made(monkeypatch, name):
  """In chunks, with the state carried from one to the next."""
  monkeypatch.setattr(sampling_module, "_CHUNK_BYTES", 4)
  config, pieces = variants.VARIANTS[name], []
  length, patch = 2 * config.context - 2, config.levels[0].patch_size
  made = generate(
    variants.model(name), b"\3\1", length, num_samples=2, seed=5, on_bytes=lambda new: pieces.append(new.copy())
  )
  assert len(pieces) >= length // max(patch, 4) and max(piece.shape[1] for piece in pieces) <= max(patch, 4)
  np.testing.assert_array_equal(np.concatenate(pieces, axis=1), made.bytes_)
  whole = np.concatenate([np.tile(np.uint8([[3, 1]]), (2, 1)), made.bytes_], axis=1)
  np.testing.assert_allclose(made.nats, nats_by_plan(name, whole)[:, 2:], atol=1e-4)


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


@functools.partial(jax.jit, static_argnums=(1, 2))
def draws_of(logits_V, sampling, draws):
  keys = jax.random.split(jax.random.key(0), draws)
  return jax.vmap(lambda key: pick_byte(logits_V, gumbel_noise(key, 0, len(logits_V)), sampling))(keys)


def draw(logits_V, sampling, draws):
  """`draws` bytes, each with noise of its own."""
  return np.asarray(draws_of(np.asarray(logits_V, np.float32), sampling, draws))


TIES = [3.0, 2.0, 2.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("logits", [np.random.default_rng(3).standard_normal(12) * 1.5, np.zeros(12), TIES], ids=len)
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
def test_pick_byte_draws_from_the_asked_distribution(sampling, logits):
  expected, draws = distribution(np.float32(logits), sampling), 20_000
  share = np.bincount(draw(logits, sampling, draws), minlength=len(logits)) / draws
  assert (share[expected == 0] == 0).all()
  assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12).all()


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-39, 1e-20])
def test_temperatures_near_zero_pick_the_most_probable_byte(temperature):
  for logits in ([0.3, 2.0, -1.0, 1.9], [-50.0, 80.0, 79.9, 60.0]):
    assert set(draw(logits, Sampling(temperature=temperature), 50)) == {1}


@pytest.mark.parametrize("name", ["cross_patch", "perceiver_ar"])
def test_greedy_bytes_are_the_most_probable_of_the_full_forward_pass(name):
  """Whatever the seed."""
  model, config, greedy = variants.model(name), variants.VARIANTS[name], Sampling(temperature=0)
  first = config.context - config.latents if variants.is_perceiver(config) else 3
  prompt = variants.random_bytes(name, 1, seed=6)[0, :first].astype(np.uint8)
  made = [generate(model, prompt.tobytes(), config.context - first, sampling=greedy, seed=s).bytes_[0] for s in (1, 2)]
  np.testing.assert_array_equal(*made)
  logits_TV = variants.logits(name, np.concatenate([prompt, made[0]])[None].astype(np.int32))[0][-len(made[0]) :]
  np.testing.assert_array_equal(made[0], logits_TV.argmax(axis=-1))


@pytest.mark.parametrize(
  "name", [pytest.param("short_cross_patch", marks=pytest.mark.slow), "without_global", "perceiver_ar"]
)
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
