"""Matrix products in eight bits: their error, their place in training, and that nothing else has them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megabyte_jax.config import Config, ConfigError, Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.models import fp8
from megabyte_jax.models.build import abstract_model
from megabyte_jax.sharding import make_mesh
from megabyte_jax.train_state import initial_state, make_eval_step, make_train_step

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def operands(kind: str):
  """x [3, 40, 64], w [64, 48] and the gradient of their product."""
  x, w, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, 40, 64), (64, 48), (3, 40, 48)]))
  if kind == "outliers":  # one number in a thousand is a hundred times as large
    large = (jax.random.bernoulli(jax.random.key(3 + i), 1e-3, a.shape) for i, a in enumerate((x, w, dy)))
    x, w, dy = (jnp.where(at, 100 * a, a) for at, a in zip(large, (x, w, dy), strict=True))
  if kind == "small":
    x, dy = x * 1e-12, dy * 1e-9
  return x, w, dy


def result_and_gradients(product, x, w, dy):
  y, backward = jax.vjp(product, x, w)
  return y, *backward(dy)


def error(a, b) -> float:
  a, b = (np.asarray(v, np.float64) for v in (a, b))
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", ["normal", "outliers", "small"])
def test_product_and_gradients_are_those_of_float32_within_the_formats_error(kind):
  x, w, dy = operands(kind)
  got = jax.jit(functools.partial(result_and_gradients, fp8.product))(x, w, dy)
  wanted = result_and_gradients(jnp.matmul, x, w, dy)
  # Rounding to 3 bits is off by 2.6% rms, to 2 bits by 5.2%; the errors of both operands add up in squares.
  for a, b, limit in zip(got, wanted, (0.045, 0.07, 0.07), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert 0.01 < error(a, b) < limit


def test_product_is_exactly_that_of_the_rounded_operands():
  x, w, _ = operands("normal")
  x8, w8 = ((q.astype(jnp.float32) * s) for q, s in (fp8.quantise(x, E4M3), fp8.quantise(w, E4M3)))
  np.testing.assert_allclose(fp8.product(x, w), x8 @ w8, rtol=1e-6, atol=1e-5)
  low = fp8.product(x.astype(jnp.bfloat16), w)
  assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_are_powers_of_two_that_bring_the_largest_into_range(dtype):
  most = float(jnp.finfo(dtype).max)
  for largest in (most, most * 1.0001, 1.0, 3e-20, 7e20):
    q, scale = fp8.quantise(jnp.array([0.0, -largest, largest / 2]), dtype)
    mantissa, _ = np.frexp(float(scale))
    assert mantissa == 0.5
    assert most / 2 * 0.93 <= float(jnp.abs(q.astype(jnp.float32)).max()) <= most
    assert error(q.astype(jnp.float32) * scale, jnp.array([0.0, -largest, largest / 2])) < 0.13


@pytest.mark.parametrize("which", [0, 1, 2])
def test_zeros_give_zeros(which):
  arrays = list(operands("normal"))
  arrays[which] = jnp.zeros_like(arrays[which])
  got = result_and_gradients(fp8.product, *arrays)
  wanted = result_and_gradients(jnp.matmul, *arrays)
  for a, b in zip(got, wanted, strict=True):
    assert jnp.isfinite(a).all() and (jnp.any(b) or not jnp.any(a))


def test_what_is_not_finite_is_not_hidden():
  x, w, _ = operands("normal")
  for value in (jnp.inf, jnp.nan):
    assert jnp.isnan(fp8.product(x.at[1, 2, 3].set(value), w)[1, 2]).all()


def test_the_scale_of_a_spread_array_is_that_of_the_whole():
  x, w, dy = operands("outliers")
  x, dy = (jnp.tile(a, (8, 1, 1))[:8] for a in (x, dy))
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp"))
  shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ("fsdp",), ("data",))]
  step = functools.partial(result_and_gradients, fp8.product)
  spread = jax.jit(step, in_shardings=shardings)(x, w, dy)
  for a, b in zip(spread, jax.jit(step)(x, w, dy), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_only_products_over_the_last_axes_are_made():
  with pytest.raises(ValueError, match="last axes"):
    fp8.dot_general(jnp.ones((4, 4)), jnp.ones((4, 4)), (((0,), (0,)), ((), ())))


def tiny(**options) -> Config:
  config = Config.from_dict(tiny_config.get_config())
  return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0, **options))


def learned(config: Config, steps: int = 200) -> list[float]:
  """Nats per byte of each step on a text that repeats."""
  config = dataclasses.replace(config, num_steps=steps)
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  text = np.frombuffer(b"patches of bytes, and bytes of patches; " * 40, np.uint8)
  starts = np.random.default_rng(0).integers(0, 1000, (steps, config.batch_size))
  with jax.set_mesh(mesh):
    state, step, losses = initial_state(config, mesh), make_train_step(config), []
    for row in starts:
      state, metrics = step(state, jnp.asarray(np.stack([text[s : s + config.model.context] for s in row])))
      losses.append(float(metrics["nats"] / metrics["bytes"]))
  return losses


@pytest.mark.slow
def test_training_learns_as_in_float32():
  exact, rounded = learned(tiny(init_std=0.1)), learned(tiny(init_std=0.1, products="fp8"))
  assert rounded != exact
  assert exact[-1] < 0.3 * exact[0]
  np.testing.assert_allclose(rounded[:5], exact[:5], rtol=5e-3)
  np.testing.assert_allclose(np.mean(rounded[-20:]), np.mean(exact[-20:]), rtol=0.05)


@pytest.mark.slow
def test_scan_and_recomputation_change_nothing():
  kinds = [("none", "always"), ("named", "never"), ("full", "always")]
  losses = [learned(tiny(products="fp8", remat=remat, scan_layers=scan), steps=4) for remat, scan in kinds]
  for other in losses[1:]:
    np.testing.assert_allclose(other, losses[0], rtol=1e-3)


MODELS = {
  "megabyte": tiny().model,
  "perceiver_ar": PerceiverARConfig(context=32, latents=16, width=32, num_layers=2, num_heads=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_every_product_of_a_block_is_in_eight_bits_and_only_in_training(family):
  model = dataclasses.replace(MODELS[family], products="fp8", dropout=0.0)
  config = dataclasses.replace(tiny(), model=model)
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  x_BT = jnp.zeros((config.batch_size, 32), jnp.uint8)
  with jax.set_mesh(mesh):
    state = initial_state(config, mesh)
    trained = str(make_train_step(config).trace(state, x_BT).jaxpr)
    length_B = jnp.full((config.batch_size,), 32)
    start_B = length_B - 16 if family == "perceiver_ar" else None
    evaluated = str(make_eval_step(config).trace(state.parameters, x_BT, length_B, start_B).jaxpr)
  assert "f8_e4m3" in trained and "f8_e5m2" in trained
  assert "f8_" not in evaluated


def test_parameters_are_the_same_with_and_without():
  config = dataclasses.replace(MODELS["megabyte"], products="fp8")
  for training in (False, True):
    assert abstract_model(config, training=training)[1] == abstract_model(MODELS["megabyte"])[1]
  graph, _ = abstract_model(config, training=True)
  assert isinstance(graph, nnx.GraphDef)


@pytest.mark.parametrize(
  ("name", "options"), [("width", {"width": 24}), ("ff_width", {"ff_width": 40}), ("head_dim", {"head_dim": 6})]
)
def test_widths_that_are_no_multiples_of_16_are_refused(name, options):
  level = Level(**{"patch_size": 1, "width": 32, "num_layers": 1, "num_heads": 2, **options})
  with pytest.raises(ConfigError, match=rf"{name} is \d+; model.products=fp8 needs a multiple of 16"):
    MegabyteConfig(context=8, levels=(level,), products="fp8")
  MegabyteConfig(context=8, levels=(level,))
