"""The schedule of appendix A.1, and AdamW against a transcription in NumPy."""

import jax
import numpy as np
import pytest

from megabyte_jax.config import OptimizerConfig
from megabyte_jax.optimizer import learning_rate, make_optimizer


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
  optimizer = make_optimizer(config, num_steps=4)
  ours = jax.tree.map(np.float32, parameters)
  state = optimizer.init(ours)
  update = jax.jit(optimizer.update)
  for gradient in gradients:
    updates, state = update(jax.tree.map(np.float32, gradient), state, ours)
    ours = jax.tree.map(np.add, ours, updates)
  for name, value in zip(parameters, expected, strict=True):
    np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
    assert np.abs(value - parameters[name]).max() > 0.01
