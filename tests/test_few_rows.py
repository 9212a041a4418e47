"""The kernels of decoding on a GPU, interpreted, against what they are to compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.config import Level, MegabyteConfig
from megabyte_jax.models import build, few_rows
from megabyte_jax.models.few_rows import Filled, Norm, Parts, Short


def normal(seed, *shape, dtype=jnp.bfloat16):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def reference(x, w, bias, norm, activation, added):
  """In float64, the result of the norm rounded."""
  x, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
  if norm is not None:
    x = x - x.mean(axis=-1, keepdims=True) if norm.centered else x
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + norm.epsilon) * np.asarray(norm.scale_D, np.float64)
    x = x + (0 if norm.shift_D is None else np.asarray(norm.shift_D, np.float64))
    x = np.asarray(jnp.asarray(x, w.dtype), np.float64)
  y = x @ w64.T
  y = y if bias is None else y + np.asarray(bias, np.float64)
  y = y if activation is None else np.asarray(activation(jnp.asarray(y, jnp.float32)), np.float64)
  return y if added is None else y + np.asarray(added, np.float64)


def check(actual, expected, steps=1.5):
  """Within so many steps of bfloat16, of the scale of the result."""
  expected = np.asarray(expected, np.float64)
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=steps / 256, atol=steps / 256)


@pytest.mark.parametrize("rows", [1, 5, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (3, 16, 33))])
@pytest.mark.parametrize("inputs,outputs", [(64, 48), (320, 96), (2304, 16)], ids=str)
def test_products_are_those_of_the_reference(rows, inputs, outputs):
  x, w, bias = normal(0, rows, inputs), normal(1, outputs, inputs) / inputs**0.5, normal(2, outputs)
  added = normal(3, rows, outputs)
  scale, shift = normal(4, inputs, dtype=jnp.float32), normal(5, inputs, dtype=jnp.float32)
  for norm, b, activation, add in [
    (None, bias, None, added),
    (Norm(scale, shift, True, 1e-5), bias, jax.nn.relu, None),
    (Norm(scale, None, False, 1e-5), None, jax.nn.silu, None),
  ]:
    made = few_rows.product(x, w, b, norm=norm, activation=activation, added_RF=add)
    assert made.shape == (rows, outputs) and made.dtype == jnp.bfloat16
    check(made, reference(x, w, b, norm, activation, add), steps=4 if norm else 1.5)


def attention_reference(q, k, v, keys, values, first, end):
  """float64 [R, H * K]: over slots first .. end - 1 of keys and values [R, S, H, K], and the slot itself."""
  q, k, v, keys, values = (np.asarray(a, np.float64) for a in (q, k, v, keys, values))
  keys = np.concatenate([keys[:, first:end], k[:, None]], axis=1)
  values = np.concatenate([values[:, first:end], v[:, None]], axis=1)
  logits = np.einsum("RHK,RSHK->RHS", q, keys) * q.shape[-1] ** -0.5
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return np.einsum("RHS,RSHK->RHK", p / p.sum(axis=-1, keepdims=True), values).reshape(q.shape[0], -1)


@pytest.mark.parametrize(
  "rows,slots,first,end",
  [
    (1, 1024, 0, 0),
    (1, 1024, 0, 3),
    (1, 1024, 0, 1023),
    (2, 1024, 100, 700),
    (5, 300, 0, 299),
    (3, 8, 2, 7),
    (3, 12, 0, 9),
  ],
)
def test_attention_is_that_of_the_reference(rows, slots, first, end):
  """Of the layer asked for, over the slots asked for; in parts, and added up by the product that follows."""
  heads, width, layers, layer = 4, 16, 3, 1
  q, k, v = (3 * normal(i, rows, heads, width) for i in range(3))
  keys, values = (normal(i, layers, rows, slots, heads, width) for i in (3, 4))
  past = Filled(keys, values, jnp.full(1, layer), jnp.array([first, end]))
  made = few_rows.attend(jnp.stack([q, k, v], axis=1), past)
  assert type(made) is (Short if slots < 16 and rows < 5 else Parts if rows < 5 else type(q))
  expected = attention_reference(q, k, v, keys[layer], values[layer], first, end)
  if isinstance(made, jax.Array):
    check(made, expected)
  w, x = normal(5, 64, heads * width) / 8, normal(6, rows, 64)
  check(few_rows.product(made, w, added_RF=x), expected @ np.asarray(w, np.float64).T + x, steps=2.5)


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
    ("cross_patch", 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("levels", 5), ("window", 1), ("levels", 65))),
  ],
)
def test_a_step_with_kernels_gives_the_logits_of_the_full_forward_pass(monkeypatch, name, rows):
  """In bfloat16, no further from float32 than the full forward pass is: by the kernels, and above 64 rows without."""
  monkeypatch.setattr(few_rows, "on_one_gpu", lambda dtype: True)
  exact = dataclasses.replace(MODELS[name], compute_dtype="float32", init_std=0.1, dropout=0.0)
  config = dataclasses.replace(exact, compute_dtype="bfloat16")
  model = build.make_model(exact, nnx.Rngs(0))
  graph, parameters = build.abstract_model(config)[0], nnx.split(model)[1]
  x_BT = jnp.asarray(np.random.default_rng(0).integers(0, 256, (rows, config.context)), jnp.int32)
  forward = jax.jit(lambda graph, parameters: nnx.merge(graph, parameters)(x_BT), static_argnums=0)
  expected = forward(nnx.split(model)[0], parameters)
  rounding = jnp.abs(forward(graph, parameters) - expected).max()
  prepared = build.in_compute_dtype(config, parameters)
  assert isinstance(prepared["levels"][0]["decoder"]["blocks"]["qkv"]["kernel"].get_value(), tuple)

  @jax.jit
  def decode(parameters, state):
    return nnx.merge(graph, parameters).decode_patch(state, lambda _, t: jnp.take(x_BT, t, axis=1))

  patch = config.levels[0].patch_size
  state = jax.jit(lambda parameters: nnx.merge(graph, parameters).read_prompt(x_BT, 4))(prepared)
  for t in range(4, config.context, patch):
    state, _, logits_BSV = decode(prepared, state)
    difference = jnp.abs(logits_BSV - expected[:, t : t + patch]).max()
    assert difference < 2 * rounding + 1e-3, (t, difference, rounding)
