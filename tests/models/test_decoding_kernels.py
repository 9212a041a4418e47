"""The kernels of decoding on a GPU, interpreted, against what they are to compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_variants import draw_parameters

from megabyte_jax.config import Level, MegabyteConfig
from megabyte_jax.models import build
from megabyte_jax.models.kernels import cached_attention, decoding_step, fused_attention
from megabyte_jax.models.layers.stack import Cache, Stack, stack_weights


def normal(seed, *shape, dtype=jnp.bfloat16):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))  # here: compiles nothing


def check(actual, expected, steps=1.5):
  """Within so many steps of bfloat16, of the scale of the result."""
  expected = np.asarray(expected, np.float64)
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=steps / 256, atol=steps / 256)


def attention_reference(q, k, v, keys, values, first, end):
  """float64 [R, H * K]: over slots first .. end - 1 of keys and values [R, S, H, K], and the slot itself."""
  q, k, v, keys, values = (np.asarray(a, np.float64) for a in (q, k, v, keys, values))
  keys = np.concatenate([keys[:, first:end], k[:, None]], axis=1)
  values = np.concatenate([values[:, first:end], v[:, None]], axis=1)
  logits = np.einsum("RHK,RSHK->RHS", q, keys) * q.shape[-1] ** -0.5
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return np.einsum("RHS,RSHK->RHK", p / p.sum(axis=-1, keepdims=True), values).reshape(q.shape[0], -1)


@pytest.mark.parametrize(
  "rows,slots,first,end", [(1, 1024, 0, 0), (1, 1024, 0, 1023), (2, 1024, 100, 700), (5, 300, 0, 299), (3, 8, 2, 7)]
)
def test_attention_is_that_of_the_reference(rows, slots, first, end):
  """Of the layer asked for, over the slots asked for."""
  heads, width, num_layers, layer = 4, 16, 3, 1
  q, k, v = (3 * normal(i, rows, heads, width) for i in range(3))
  keys, values = (normal(i, num_layers, rows, slots, heads, width) for i in (3, 4))
  past = cached_attention.Filled(keys, values, jnp.full(1, layer), jnp.array([first, end]))
  made = cached_attention.attend(jnp.stack([q, k, v], axis=1), past).reshape(rows, -1)
  check(made, attention_reference(q, k, v, keys[layer], values[layer], first, end))


WIDE = Level(patch_size=1, width=64, num_layers=2, num_heads=4)
CROSS = dataclasses.replace(WIDE, rotary=True, cross_patch=4)


@pytest.mark.parametrize(
  "level,options,slots,at,first",
  [
    (CROSS, dict(activation="silu"), 12, 9, 4),  # attention by every program, no previous span
    (dataclasses.replace(WIDE, rotary=True), dict(norm="rmsnorm", bias=False), 300, 270, 0),  # in parts
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (WIDE, dict(), 8, 5, 0),
        (CROSS, dict(activation="gelu"), 12, 9, 0),
        (dataclasses.replace(WIDE, ff_width=192), dict(activation="swiglu", bias=False), 8, 0, 0),
        (dataclasses.replace(WIDE, width=128), dict(), 1024, 1023, 0),
        (dataclasses.replace(WIDE, attention_window=100), dict(), 300, 270, 171),
      )
    ),
  ],
  ids=str,
)
def test_all_layers_in_one_kernel_are_those_of_a_step(level, options, slots, at, first):
  """In float32, with the caches: phase by phase, as several programs would do it."""
  coarse = (dataclasses.replace(WIDE, patch_size=64, width=64),) if level.cross_patch else ()
  config = MegabyteConfig(
    context=4096, levels=(*coarse, level), dropout=0.0, init_std=0.2, compute_dtype="float32", **options
  )
  assert decoding_step.obstacle(level, config, 1) == ""
  stack = nnx.jit(lambda: Stack(level, config, nnx.Rngs(0)))()  # one program
  x, r = normal(0, 1, 1, 1, level.width, dtype=jnp.float32), level.cross_patch
  shape = (level.num_layers, 1, 1, slots, *level.heads)
  cache = Cache(*(normal(i, *shape, dtype=jnp.float32) for i in (1, 2)))
  expected, expected_cache = jax.jit(stack.step)(x, cache, jnp.int32(at - r), first < r)
  made, *new = decoding_step.step(
    x[0, 0, 0],
    stack_weights(stack),
    *(a[:, 0, 0] for a in cache),
    first=jnp.int32(first),
    at=jnp.int32(at),
    slot=jnp.int32(at - r),
    level=level,
    options=config,
    epsilon=1e-5,
  )
  np.testing.assert_allclose(stack.norm(made), expected[0, 0, 0], atol=1e-5)
  for a, b in zip(new, expected_cache, strict=True):
    np.testing.assert_allclose(a, b[:, 0, 0], atol=2e-5)


def model_of(config):
  """With parameters drawn by NumPy, which are not compiled for."""
  return nnx.merge(build.abstract_model(config)[0], draw_parameters(config))


COARSE, FINE = dict(patch_size=4, width=64, num_layers=2, num_heads=2), dict(width=64, num_layers=2, num_heads=4)
MODELS = {
  "levels": MegabyteConfig(context=16, levels=(Level(**COARSE), Level(patch_size=1, **FINE))),
  "cross_patch": MegabyteConfig(
    context=16,
    levels=(Level(**COARSE, rotary=True), Level(patch_size=1, rotary=True, cross_patch=2, **FINE)),
    norm="rmsnorm",
    bias=False,
    activation="silu",
  ),
  "window": MegabyteConfig(
    context=16,
    levels=(Level(patch_size=1, attention_window=5, ff_width=192, **FINE),),
    activation="swiglu",
    qk_norm=True,
  ),
}


@pytest.mark.parametrize(
  "name,rows",
  [
    ("levels", 3),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (("levels", 1), ("cross_patch", 1), ("cross_patch", 3), ("window", 1))
    ),
  ],
)
def test_a_step_with_kernels_gives_the_logits_of_the_full_forward_pass(monkeypatch, name, rows):
  """In bfloat16, no further from float32 than the full forward pass is: in one kernel, or by XLA's products."""
  monkeypatch.setattr(cached_attention, "on_one_gpu", lambda dtype: True)
  exact = dataclasses.replace(MODELS[name], compute_dtype="float32", dropout=0.0)
  config = dataclasses.replace(exact, compute_dtype="bfloat16")
  model = model_of(exact)
  graph, parameters = build.abstract_model(config)[0], nnx.split(model)[1]
  x_BT = jnp.asarray(np.random.default_rng(0).integers(0, 256, (rows, config.context)), jnp.int32)
  forward = jax.jit(lambda graph, parameters: nnx.merge(graph, parameters)(x_BT), static_argnums=0)
  expected = forward(nnx.split(model)[0], parameters)
  rounding = jnp.abs(forward(graph, parameters) - expected).max()
  prepared = build.in_compute_dtype(config, parameters, rows)
  in_one = rows == 1 and not config.qk_norm
  assert isinstance(prepared["levels"][0]["decoder"]["blocks"]["qkv"]["kernel"].get_value(), tuple) != in_one

  @jax.jit
  def decode(parameters, state):
    return nnx.merge(graph, parameters).decode_patch(state, lambda _, t: jnp.take(x_BT, t, axis=1))

  patch = config.levels[0].patch_size
  state = jax.jit(lambda parameters: nnx.merge(graph, parameters).read_prompt(x_BT, 4))(prepared)
  for t in range(4, config.context, patch):
    state, _, logits_BSV = decode(prepared, state)
    difference = jnp.abs(logits_BSV - expected[:, t : t + patch]).max()
    assert difference < 2 * rounding + 1e-3, (t, difference, rounding)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("without", ["", "attention=xla", "no Triton", "heads of 48"])
def test_decoding_does_without_kernels(monkeypatch, without, rows):
  """Where a config says so, JAX has none or they cannot serve a level: parameters are merely cast, as on a CPU."""
  monkeypatch.setattr(cached_attention, "on_one_gpu", lambda dtype: True)

  def prepared_and_kernels(config):
    graph, parameters = nnx.split(model_of(config))
    prepared = build.in_compute_dtype(config, parameters, rows)
    x_BT = jnp.zeros((rows, config.context), jnp.int32)

    def decode(parameters):
      model = nnx.merge(graph, parameters)
      return model.decode_patch(model.read_prompt(x_BT, 4), lambda logits_BV, _: jnp.argmax(logits_BV, axis=-1))[1]

    return prepared, str(jax.make_jaxpr(decode)(prepared)).count("pallas_call")

  config = dataclasses.replace(MODELS["levels"], compute_dtype="bfloat16")
  if not without:
    assert prepared_and_kernels(config)[1] > 0
    return
  if without == "attention=xla":
    config = dataclasses.replace(config, attention="xla")
  elif without == "heads of 48":
    config = dataclasses.replace(config, levels=(Level(**COARSE | dict(width=96)), config.levels[1]))
  else:
    monkeypatch.setattr(cached_attention, "triton", lambda: None)
  prepared, kernels = prepared_and_kernels(config)
  assert kernels == 0
  assert not any(isinstance(leaf.get_value(), tuple) for leaf in jax.tree.leaves(prepared, is_leaf=build.is_variable))


def test_tiles_of_short_spans_need_triton(monkeypatch):
  """Without, attention=auto takes what is left."""
  monkeypatch.setattr(fused_attention, "platform", lambda: "gpu")
  q_BNMHK = jax.ShapeDtypeStruct((1, 8, 8, 2, 64), jnp.bfloat16)
  assert not fused_attention.tile_obstacle(q_BNMHK, 0)
  monkeypatch.setattr(fused_attention, "triton", lambda: None)
  assert "Triton" in fused_attention.tile_obstacle(q_BNMHK, 0)
