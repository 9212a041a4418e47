"""Splash attention, interpreted on CPU, against the xla attention: values and gradients, alone and over meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megabyte_jax.config import MeshConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.models.kernels import fused_attention
from megabyte_jax.models.layers.attention import Past, attention
from megabyte_jax.parallel.sharding import make_mesh


def value_and_gradients(function, qkv, weights):
  def weighted_sum(q, k, v):
    out = function(q, k, v)
    return jnp.sum(out * weights), out

  gradients, out = jax.jit(jax.grad(weighted_sum, argnums=(0, 1, 2), has_aux=True))(*qkv)
  return jax.tree.map(np.asarray, (out, *gradients))


@pytest.mark.parametrize(
  ("mesh", "slots", "window"),
  [
    (None, 256, 0),
    (None, 256, 96),
    (MeshConfig(data=1, fsdp=2, seq=2, tensor=2), 256, 0),
    (MeshConfig(data=2, seq=4), 512, 160),
    (MeshConfig(data=1, seq=8), 640, 0),  # 80 queries a device: one block, not a multiple of 128
  ],
)
def test_splash_is_the_reference(mesh, slots, window):
  B, H, K = 2, 2, 16
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, weights = (jax.random.normal(key, (B, 1, slots, H, K)) for key in keys)

  def reference(q, k, v):
    return attention(q, k, v, window=window, implementation="xla")

  def splash(q, k, v):
    return fused_attention.splash(q, k, v, window, interpret=True)

  wanted = value_and_gradients(reference, (q, k, v), weights)
  if mesh is None:
    found = value_and_gradients(splash, (q, k, v), weights)
  else:
    # data and fsdp divide the two rows, or there are none of these axes
    with jax.set_mesh(make_mesh(mesh)):
      found = value_and_gradients(splash, (q, k, v), weights)
  for name, a, b in zip(("out", "dq", "dk", "dv"), wanted, found, strict=True):
    np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-5 * np.abs(a).max(), err_msg=name)


def zeros(slots, *, spans=1, rows=1, heads=2):
  return (jnp.zeros((rows, spans, slots, heads, 8)),) * 3


@pytest.mark.parametrize(
  ("platform", "slots", "options", "reason"),
  [
    ("cpu", 256, {}, "not a TPU"),
    ("tpu", 200, {}, "200, is not a multiple of 128"),
    ("tpu", 256, {"dropout": 0.1, "dropout_key": jax.random.key(0)}, "dropout"),
  ],
)
def test_splash_that_cannot_serve_is_an_error_that_says_why(monkeypatch, platform, slots, options, reason):
  monkeypatch.setattr("megabyte_jax.models.layers.attention.platform", lambda: platform)
  with pytest.raises(ConfigError, match=reason):
    attention(*zeros(slots), implementation="splash", **options)


@pytest.mark.parametrize(("spans", "options"), [(2, {}), (1, {"past": Past(*zeros(4)[:2], jnp.ones((1,), bool))})])
def test_splash_leaves_local_models_and_caches_to_xla(monkeypatch, spans, options):
  monkeypatch.setattr("megabyte_jax.models.layers.attention.platform", lambda: "tpu")
  monkeypatch.setitem(attention.__globals__["_FUSED"], "splash", lambda *_: pytest.fail("splash was called"))
  assert attention(*zeros(256, spans=spans), implementation="splash", **options).shape[1] == spans


def test_splash_on_an_uneven_mesh_is_an_error(monkeypatch):
  monkeypatch.setattr("megabyte_jax.models.layers.attention.platform", lambda: "tpu")
  with (
    jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=8))),
    pytest.raises(ConfigError, match="8 devices do not divide 2 heads"),
  ):
    attention(*zeros(256), implementation="splash")


@pytest.mark.parametrize(
  ("slots", "spans", "taken"), [(256, 1, "splash"), (200, 1, "xla"), (16, 1, "xla"), (256, 2, "xla")]
)
def test_auto_takes_splash_where_it_can_serve(monkeypatch, slots, spans, taken):
  monkeypatch.setattr("megabyte_jax.models.layers.attention.platform", lambda: "tpu")
  calls = []

  def splash(q, k, v, window):
    calls.append("splash")
    return v

  monkeypatch.setitem(attention.__globals__["_FUSED"], "splash", splash)
  attention(*zeros(slots, spans=spans))
  assert (calls or ["xla"]) == [taken]


@pytest.mark.parametrize(
  ("mesh", "spans"),
  [(MeshConfig(data=1, fsdp=2, seq=2, tensor=2), 1), (MeshConfig(data=1, seq=4, tensor=2), 1), (MeshConfig(seq=4), 8)],
)
def test_kernels_without_a_mesh_of_their_own_are_spread(monkeypatch, mesh, spans):
  """cuDNN's way over a mesh, with the reference in its place: sequence shards become head shards and come back."""
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, weights = (jax.random.normal(key, (2, spans, 32, 8, 4)) for key in keys)

  def reference(q, k, v, window=0):
    return attention(q, k, v, window=window, implementation="xla")

  wanted = value_and_gradients(reference, (q, k, v), weights)
  monkeypatch.setattr(fused_attention, "_cudnn", reference)
  with jax.set_mesh(make_mesh(mesh)):
    found = value_and_gradients(lambda q, k, v: fused_attention.cudnn(q, k, v, 0), (q, k, v), weights)
  for a, b in zip(wanted, found, strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_cudnn_is_not_asked_for_what_it_cannot_differentiate(monkeypatch):
  """An odd number of slots or keys; forward alone it takes them."""
  monkeypatch.setattr(fused_attention, "platform", lambda: "gpu")
  even, odd = (jnp.zeros((1, 1, slots, 2, 64), jnp.bfloat16) for slots in (126, 125))
  assert fused_attention.cudnn_obstacle(even) == fused_attention.masked_cudnn_obstacle(even, 502) == ""
  assert fused_attention.cudnn_obstacle(odd) == "it has no gradients for an odd number of slots, 125"
  assert "odd number of slots, 125" in fused_attention.masked_cudnn_obstacle(odd, 502)
  assert "odd number of slots, 501" in fused_attention.masked_cudnn_obstacle(even, 501)


def test_head_trade_needs_enough_heads(monkeypatch):
  monkeypatch.setattr(fused_attention, "platform", lambda: "gpu")
  q = jnp.zeros((8, 1, 64, 2, 64), jnp.bfloat16)
  assert fused_attention.cudnn_obstacle(q) == ""
  with jax.set_mesh(make_mesh(dataclasses.replace(MeshConfig(), data=2, seq=4))):
    assert "mesh.seq 4 does not divide the 2 heads" in fused_attention.cudnn_obstacle(q)
