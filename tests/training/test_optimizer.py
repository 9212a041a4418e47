"""The schedules, and AdamW and Muon against transcriptions in NumPy."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import optax
import pytest

from megabyte_jax.checkpoints.arrays import flat_arrays
from megabyte_jax.config import Config, Level, MegabyteConfig, MeshConfig, OptimizerConfig
from megabyte_jax.models.build import abstract_model, parameter_info
from megabyte_jax.parallel.parameter_info import ParameterInfo, map_with_info, parameter_name
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh
from megabyte_jax.training import muon
from megabyte_jax.training.muon import Matrices, orthogonal
from megabyte_jax.training.optimizer import make_optimizer
from megabyte_jax.training.schedule import learning_rate
from megabyte_jax.training.state import initial_state, make_train_step


def test_warm_up_over_500_steps_then_linearly_to_zero():
  rate = learning_rate(OptimizerConfig(), 10_500)
  expected = {0: 0, 1: 2e-4 / 500, 250: 1e-4, 500: 2e-4, 5500: 1e-4, 10_499: 2e-4 / 10_000, 10_500: 0}
  for step, value in expected.items():
    assert float(rate(step)) == pytest.approx(value, abs=1e-10), step


def test_other_schedules():
  rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=0, end_learning_rate=0.5), 10)
  assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([1.0, 0.75, 0.5])
  short = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=500), 4)  # a run within its warm-up
  assert [float(short(step)) for step in range(4)] == pytest.approx([0.0, 0.25, 0.5, 0.75])


def adamw(parameters, gradients, rates, c):
  """AdamW with clipping, one step for each of `gradients`, in float64."""
  m = [np.zeros_like(p) for p in parameters]
  v = [np.zeros_like(p) for p in parameters]
  for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient))
    gradient = [g * min(1.0, c.clip_norm / norm) for g in gradient]
    m = [c.b1 * a + (1 - c.b1) * g for a, g in zip(m, gradient, strict=True)]
    v = [c.b2 * a + (1 - c.b2) * g**2 for a, g in zip(v, gradient, strict=True)]
    updates = [a / (1 - c.b1**t) / (np.sqrt(b / (1 - c.b2**t)) + c.eps) for a, b in zip(m, v, strict=True)]
    parameters = [p - rate * (u + c.weight_decay * p) for p, u in zip(parameters, updates, strict=True)]
  return parameters


def test_three_steps_of_adamw_by_hand():
  """Weight decay on every parameter, biases and norms included; the second gradient is clipped, the others are not."""
  config = OptimizerConfig(learning_rate=0.1, warmup_steps=2)
  rng = np.random.default_rng(0)
  shapes = {"bias": (3,), "kernel": (4, 3), "norm.scale": (5,)}
  parameters = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  gradients = [{name: s * rng.normal(size=shape) for name, shape in shapes.items()} for s in (0.05, 9.0, 0.1)]
  norms = [np.sqrt(sum(np.sum(g**2) for g in gradient.values())) for gradient in gradients]
  assert norms[0] < 1 < norms[1] and norms[2] < 1

  expected = adamw(
    list(parameters.values()), [list(gradient.values()) for gradient in gradients], [0.0, 0.05, 0.1], config
  )
  optimizer = make_optimizer(config, num_steps=4, infos={})
  ours = jax.tree.map(np.float32, parameters)
  state = optimizer.init(ours)
  update = jax.jit(optimizer.update)
  for gradient in gradients:
    updates, state = update(jax.tree.map(np.float32, gradient), state, ours)
    ours = jax.tree.map(np.add, ours, updates)
  for name, value in zip(parameters, expected, strict=True):
    np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
    assert np.abs(value - parameters[name]).max() > 0.01


# -- Schedules --


def test_cosine():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, end_learning_rate=0.2, schedule="cosine")
  rate = learning_rate(config, 110)
  expected = {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.2 + 0.4 * (1 + 0.5**0.5), 60: 0.6, 110: 0.2}
  for step, value in expected.items():
    assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


def test_half_cosine():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, end_learning_rate=0.2, schedule="half_cosine")
  rate = learning_rate(config, 110)
  expected = {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.2 + 0.8 * 0.5**0.5, 110: 0.2}
  for step, value in expected.items():
    assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


def test_warm_up_stable_decay():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="wsd", decay_share=0.25)
  rate = learning_rate(config, 100)
  expected = {0: 0.0, 5: 0.5, 10: 1.0, 50: 1.0, 75: 1.0, 80: 0.8, 99: 0.04, 100: 0.0}
  for step, value in expected.items():
    assert float(rate(step)) == pytest.approx(value, abs=1e-6), step
  constant = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="constant"), 20)
  assert [float(constant(step)) for step in (0, 5, 10, 19, 100)] == pytest.approx([0, 0.5, 1, 1, 1])
  short = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=9, schedule="wsd"), 10)  # decays at once
  assert [float(short(step)) for step in (8, 9, 10)] == pytest.approx([8 / 9, 1.0, 0.0])


# -- Rates of one's own --


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_of_kinds_and_levels(name):
  """Each update is that of one rate for all, weight decay included, times the factors that belong to the parameter."""
  matrix_rate = "fan_in" if name == "adamw" else "same"
  plain = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=1, weight_decay=0.3)
  own = dataclasses.replace(plain, matrix_rate=matrix_rate, embedding_rate=5.0, level_rates=(1.0, 2.0))
  infos, tree = parameter_info(MODEL), variants.draw_parameters(MODEL)
  gradient = variants.draw_parameters(MODEL, seed=1)

  def second_updates(config):
    optimizer = make_optimizer(config, num_steps=1000, infos=infos)
    state, update = optimizer.init(tree), jax.jit(optimizer.update)
    _, state = update(gradient, state, tree)  # the first step's rate is 0
    return flat_arrays(update(gradient, state, tree)[0])

  before, after = second_updates(plain), second_updates(own)
  for parameter, info in infos.items():
    factor = (1.0, 2.0)[info.level] * (5.0 if info.kind in ("table", "positions", "pad") else 1.0)
    if name == "adamw" and info.kind in ("matrix", "output"):
      factor /= info.fan_in**0.5
    atol = 5e-6 if name == "muon" else 0.0  # two programs round differently, and Muon makes that more
    np.testing.assert_allclose(after[parameter], before[parameter] * factor, rtol=1e-5, atol=atol, err_msg=parameter)


# -- Muon --

MODEL = dataclasses.replace(variants.VARIANTS["modern"], bias=True, norm="layernorm", tied_output=False)


def newton_schulz(g, rounded=lambda x: x):
  """Five Newton-Schulz steps for one matrix (Keller Jordan's coefficients), operands of its products rounded."""
  wide = g if g.shape[0] <= g.shape[1] else g.T
  x = wide / np.linalg.norm(wide)
  for _ in range(5):
    a = rounded(x) @ rounded(x).T
    x = 3.4445 * x + rounded(-4.7750 * a + 2.0315 * rounded(a) @ rounded(a)) @ rounded(x)
  return x if wide is g else x.T


def matrices_of(name, value):
  """The matrices [inputs, outputs] that a parameter is made of; None for what Muon leaves alone."""
  if name.endswith("from_parent"):
    return [value]
  if ".blocks." not in name or not name.endswith("kernel"):
    return None
  layers = list(value)
  if "qkv" in name:
    return [layer[:, i].reshape(layer.shape[0], -1) for layer in layers for i in range(3)]
  if "ff_in" in name:
    return [layer[:, i] for layer in layers for i in range(2)]
  return [layer.reshape(-1, layer.shape[-1]) for layer in layers]


def test_two_steps_of_muon_by_hand():
  """Every layer's matrix by itself, q, k and v apart, both halves of SwiGLU apart; the first step does not move."""
  config = OptimizerConfig(name="muon", learning_rate=0.1, warmup_steps=1, clip_norm=1e9)
  before = flat_arrays(variants.draw_parameters(MODEL))
  rng = np.random.default_rng(0)
  gradients = [{name: rng.normal(size=leaf.shape) for name, leaf in before.items()} for _ in range(2)]
  optimizer = make_optimizer(config, num_steps=1000, infos=parameter_info(MODEL))
  tree = variants.draw_parameters(MODEL)
  state, update = optimizer.init(tree), jax.jit(optimizer.update)
  for gradient in gradients:
    leaves = [np.float32(gradient[name]) for name in before]
    updates, state = update(jax.tree.unflatten(jax.tree.structure(tree), leaves), state, tree)
    tree = jax.tree.map(np.add, tree, updates)
  changed = 0
  for name, after in flat_arrays(tree).items():
    old = matrices_of(name, np.asarray(before[name], np.float64))
    if old is None:
      continue
    b, c = config.momentum, config.weight_decay
    first, second = (matrices_of(name, gradient[name]) for gradient in gradients)
    for p, g, h, new in zip(old, first, second, matrices_of(name, np.asarray(after)), strict=True):
      momentum = b * (1 - b) * g + (1 - b) * h
      nesterov = b * momentum / (1 - b**3) + (1 - b) * h / (1 - b**2)
      step = 0.2 * np.sqrt(max(p.shape)) * newton_schulz(nesterov)
      np.testing.assert_allclose(new, p - 0.1 * (step + c * p), atol=2e-5, err_msg=name)
      changed += 1
  # Two levels of two blocks: q, k, v, output, two halves and the way back; and the way from the global model.
  assert changed == 2 * 2 * 7 + 1


@pytest.mark.parametrize(("device", "quick"), [("cpu", False), ("gpu", True)])
def test_muon_multiplies_in_bfloat16_on_gpus(monkeypatch, device, quick):
  monkeypatch.setattr("megabyte_jax.training.muon.platform", lambda: device)
  infos = {"kernel": ParameterInfo("matrix", ("hidden", "width"), ("hidden",), fan_in=4)}
  optimizer = make_optimizer(OptimizerConfig(name="muon"), 10, infos)
  tree = {"kernel": jax.ShapeDtypeStruct((4, 4), np.float32)}
  text = jax.jit(optimizer.update).trace(tree, jax.eval_shape(optimizer.init, tree), tree).lower().as_text()
  products = re.findall(r"dot_general.*\(tensor<4x4x(\w+)>, tensor<4x4x(\w+)>\)", text)
  assert products == [("bf16", "bf16") if quick else ("f32", "f32")] * 15


def test_muon_is_that_of_optax():
  infos, tree = parameter_info(MODEL), variants.draw_parameters(MODEL, seed=1)

  def axes(_, info):
    return optax.contrib.MuonDimensionNumbers(info.input_places, info.output_places) if info.kind == "matrix" else None

  def numbers(parameters):
    return map_with_info(axes, parameters, infos)

  reference = optax.contrib.muon(1.0, beta=0.95, muon_weight_dimension_numbers=numbers, consistent_rms=0.2)
  expected = flat_arrays(jax.jit(reference.update)(tree, reference.init(tree), tree)[0])
  config = OptimizerConfig(name="muon", learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0)
  optimizer = make_optimizer(dataclasses.replace(config, clip_norm=math.inf), 10, infos)
  updates = flat_arrays(jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)[0])
  for name, info in infos.items():
    if info.kind == "matrix":
      np.testing.assert_allclose(updates[name], expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(48, 48), (32, 96)])
def test_muon_in_bfloat16(monkeypatch, shape):
  """No further from exact updates than steps by hand whose operands alone have eight bits."""

  def rounded(x):
    return np.float64(np.asarray(x, jnp.bfloat16))

  def distance(y, wanted):
    return np.linalg.norm(y - wanted) / np.linalg.norm(wanted)

  x = np.random.default_rng(0).normal(size=(8, *shape))
  x /= np.linalg.norm(x, axis=(1, 2), keepdims=True)
  exact = np.stack([newton_schulz(matrix) for matrix in x])
  by_hand = np.stack([newton_schulz(matrix, rounded) for matrix in x])
  monkeypatch.setattr("megabyte_jax.training.muon.platform", lambda: "gpu")
  made = np.float64(jax.jit(muon.newton_schulz)(np.float32(x)))
  assert 1e-4 < distance(made, exact) < min(2.5e-2, distance(by_hand, exact))


def test_a_matrix_without_a_gradient_stays():
  info = ParameterInfo("matrix", ("width", "hidden"), ("width",), fan_in=4)
  assert not np.any(orthogonal({"kernel": np.zeros((4, 8), np.float32)}, {"kernel": info}, 1e-8)["kernel"])


def changed_by_muon(config):
  """The names of the parameters that have momenta of Muon's."""
  shapes, infos = abstract_model(config)[1], parameter_info(config)
  state = jax.eval_shape(make_optimizer(OptimizerConfig(name="muon"), 10, infos).init, shapes)[1].inner_states["muon"]
  return {name for name in infos if any(path.endswith(name) for path in flat_paths(state))}


def flat_paths(tree):
  return [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_what_is_no_matrix_goes_to_adamw():
  changed = changed_by_muon(MODEL)
  for name in parameter_info(MODEL):
    assert (name in changed) == (matrices_of(name, np.zeros((2, 2, 3, 2, 2))) is not None), name


def test_muons_matrices_of_perceiver_ar():
  config = variants.VARIANTS["perceiver_ar_modern"]
  infos, changed = parameter_info(config), changed_by_muon(config)
  expected = {
    "cross.query": ((0,), (1, 2)),
    "cross.key_value": ((0,), (2, 3)),
    "cross.attention_out": ((0, 1), (2,)),
    "cross.ff_in": ((0,), (2,)),
    "decoder.blocks.ff_out": ((1,), (2,)),
    "decoder.blocks.qkv": ((1,), (3, 4)),
  }
  for name, axes in expected.items():
    info = infos[f"{name}.kernel"]
    shape = tuple(range(2, 2 + len(info.axes)))
    assert Matrices.of(shape, info)[1:3] == axes and f"{name}.kernel" in changed, name
  assert not any(name.startswith("embedder") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, seq=1, tensor=2)])
def test_muon_is_the_same_on_any_mesh(mesh):
  """A training step, and no device holds all of a momentum."""
  levels = (
    Level(patch_size=4, width=64, num_layers=2, num_heads=4),
    Level(patch_size=1, width=32, num_layers=2, num_heads=4),
  )
  model = MegabyteConfig(context=32, levels=levels, dropout=0.0, activation="swiglu", qk_norm=True, init_std=0.05)
  optimizer = OptimizerConfig(name="muon", learning_rate=0.01, warmup_steps=0)
  config = Config(model=model, optimizer=optimizer, batch_size=8, num_steps=10)
  x_BT = np.random.default_rng(0).integers(0, 256, (8, 32), np.uint8)
  results = []
  for sizes in (MeshConfig(data=1), mesh):
    devices = jax.devices()[:1] if sizes == MeshConfig(data=1) else jax.devices()
    made = make_mesh(sizes, devices)
    with jax.set_mesh(made):
      state, step = initial_state(config, made), make_train_step(config)
      for _ in range(3):
        state, values = step(state, jax.device_put(x_BT, batch_sharding(made)))
    results.append((state, float(values["nats"])))
  (one, nats), (spread, same) = results
  assert same == pytest.approx(nats, rel=1e-5)
  for name, leaf in flat_arrays(one.parameters).items():
    np.testing.assert_allclose(flat_arrays(spread.parameters)[name], leaf, atol=2e-4, err_msg=name)
  moments = {name: leaf for name, leaf in flat_arrays(spread.opt_state).items() if name.endswith("ff_in.kernel")}
  assert moments and all(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in moments.values())
