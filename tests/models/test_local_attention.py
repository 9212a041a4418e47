"""Attention within many short spans as a kernel, step by step on a CPU, against the float32 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megabyte_jax.config import MeshConfig
from megabyte_jax.models.kernels import fused_attention, local_attention
from megabyte_jax.models.layers import attention
from megabyte_jax.models.layers.attention import Past
from megabyte_jax.parallel.sharding import make_mesh


def reference(q, k, v, r):
  q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
  N, M = q.shape[1:3]
  return attention._xla(q, k, v, jnp.tril(jnp.ones((M, M), bool)), past(k, v, r) and Past(*past(k, v, r)), 0.0, None)


def past(k, v, r):
  N, M = k.shape[1:3]
  if not r:
    return None
  earlier = (attention.previous_span(a[:, :, M - r :]) for a in (k, v))
  return (*earlier, jnp.arange(N)[:, None, None] > 0)


def tiles(q, k, v, r):
  earlier = past(k, v, r)
  if r:
    earlier = (*earlier[:2], earlier[2][:, 0, 0])
  return local_attention.tile_attention(q, k, v, earlier, interpret=True).astype(jnp.float32)


@pytest.mark.parametrize(
  ("shape", "r"),
  [
    ((1, 64, 1, 2, 16), 0),
    ((2, 1, 64, 1, 32), 0),
    ((1, 8, 8, 2, 32), 4),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ((2, 16, 8, 3, 64), 0),
        ((2, 16, 8, 3, 64), 8),
        ((1, 32, 2, 1, 16), 2),
        ((2, 4, 16, 2, 128), 0),
        ((1, 2, 64, 1, 32), 64),
      )
    ),
  ],
)
def test_tiles_equal_the_reference_forward_and_backward(shape, r):
  q, k, v, weights = (
    jax.random.normal(key, shape).astype(jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)
  )
  assert local_attention.obstacle(q, r) == ""

  def results(function):
    def weighted(q, k, v):
      out = function(q, k, v, r)
      return jnp.sum(out * weights.astype(jnp.float32)), out

    gradients, out = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(a, np.float64) for a in (out, *gradients)]

  for ours, exact in zip(results(tiles), results(reference), strict=True):
    assert np.linalg.norm(ours - exact) < 5e-3 * np.linalg.norm(exact) + 1e-3


def test_what_the_kernel_cannot_do_is_said():
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  assert "whole tiles" in local_attention.obstacle(shape((1, 16, 5, 2, 64)), 0)
  assert "whole tiles" in local_attention.obstacle(shape((1, 1, 8, 2, 64)), 0)
  assert "earlier slots" in local_attention.obstacle(shape((1, 16, 8, 2, 64)), 3)
  assert "earlier slots" in local_attention.obstacle(shape((1, 16, 8, 2, 64)), 1)
  assert "head_dim" in local_attention.obstacle(shape((1, 16, 8, 2, 48)), 0)
  assert "bfloat16" in local_attention.obstacle(jax.ShapeDtypeStruct((1, 16, 8, 2, 64), jnp.float32), 0)


def test_a_span_that_is_spread_over_devices_is_not_for_tiles(monkeypatch):
  monkeypatch.setattr(fused_attention, "platform", lambda: "gpu")
  one, many = (jax.ShapeDtypeStruct((8, spans, 32, 8, 64), jnp.bfloat16) for spans in (1, 64))
  with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, seq=2, tensor=1))):
    assert "spread over devices" in fused_attention.tile_obstacle(one, 0)
    assert fused_attention.tile_obstacle(many, 0) == ""
