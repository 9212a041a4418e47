"""Every way to compute attention on a CPU gives what the plain one gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megabyte_jax.errors import ConfigError
from megabyte_jax.models.layers import attention as lib
from megabyte_jax.models.layers.attention import Past, attention

B, N, M, H, K = 2, 3, 8, 2, 4


def draw(*shape, seed=0):
  return jnp.asarray((np.random.default_rng(seed).standard_normal(shape) * 1.5).astype(np.float32))


def qkv(spans=N, slots=M):
  return [draw(B, spans, slots, H, K, seed=s) for s in range(3)]


def past(slots, visible):
  return Past(draw(B, N, slots, H, K, seed=3), draw(B, N, slots, H, K, seed=4), visible)


PASTS = {
  "none": None,
  "previous span": past(3, (np.arange(N) > 0)[:, None, None]),
  "cache": past(5, np.arange(5) < 2),
  "each slot its own": past(4, np.arange(4) >= np.arange(M)[:, None] - 2),
}


# One program each: op by op, every op of a new shape would be compiled by itself.


@jax.jit
def plain_of(q, k, v, visible, earlier=None):
  return lib._xla(q, k, v, visible, earlier, 0.0, None)


@functools.partial(jax.jit, static_argnames=("window", "dropout"))
def attended(q, k, v, **options):
  return attention(q, k, v, **options)


@pytest.mark.parametrize("earlier", PASTS)
def test_short_equals_plain(earlier):
  visible = np.tri(M, dtype=bool)
  short = jax.jit(lib._short)(*qkv(), visible, PASTS[earlier])
  plain = plain_of(*qkv(), visible, PASTS[earlier])
  np.testing.assert_allclose(short, plain, atol=2e-6)
  if earlier != "none":
    assert np.abs(plain - plain_of(*qkv(), visible)).max() > 0.1


@pytest.mark.parametrize(
  ("spans", "slots", "earlier", "by"),
  [(1, 1, 8, "_short"), (1, 1, 32, "_short"), (1, 1, 33, "_xla"), (3, 8, 8, "_short"), (1, 64, 0, "_xla")],
)
def test_where_a_gpu_takes_sums_of_products(monkeypatch, spans, slots, earlier, by):
  """Also for one slot of a short span, as in decoding; after many slots it is a matrix product."""
  taken = []
  monkeypatch.setattr(lib, "platform", lambda: "gpu")
  for name in ("_short", "_xla"):
    monkeypatch.setattr(lib, name, lambda *_, name=name: taken.append(name))
  before = [draw(B, spans, earlier, H, K, seed=s) for s in (3, 4)]
  attention(*qkv(spans, slots), past=Past(*before, jnp.ones(1, bool)) if earlier else None)
  assert taken == [by]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_slot_after_a_cache_equals_plain(monkeypatch, dtype):
  """And a CPU takes it, where the cache is long."""
  q, k, v, k_past, v_past = (draw(B, 1, slots, H, K, seed=s).astype(dtype) for s, slots in enumerate((1, 1, 1, 40, 40)))
  for visible in (np.arange(40) < 30, np.zeros(40, bool), (np.arange(B) > 0)[:, None, None, None]):
    earlier = Past(k_past, v_past, visible)
    plain = plain_of(q, k, v, np.ones((1, 1), bool), earlier)
    np.testing.assert_allclose(
      attended(q, k, v, past=earlier).astype("float32"),
      plain.astype("float32"),
      atol=2e-6 if dtype == "float32" else 0.03,
    )
  chosen = lib.choose_attention(q, past=earlier, window=0, implementation="auto", drops=False)
  assert chosen.name == "one slot"
  monkeypatch.setattr(lib, "platform", lambda: "tpu")
  assert lib.choose_attention(q, past=earlier, window=0, implementation="auto", drops=False).name == "xla"


@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_blocks_of_a_window_equal_plain(window):
  q, k, v = qkv(spans=1, slots=16)
  slot = np.arange(16)
  distance = slot[:, None] - slot[None, :]
  plain = plain_of(q, k, v, (distance >= 0) & (distance < window))
  by_blocks = jax.jit(lambda q, k, v: lib._windowed(q, k, v, window, 0.0, None))(q, k, v)
  np.testing.assert_allclose(by_blocks, plain, atol=2e-6)
  np.testing.assert_allclose(attended(q, k, v, window=window), plain, atol=2e-6)


@pytest.mark.parametrize(("spans", "window"), [(1, 5), (3, 5), (3, 4)])
def test_windows_that_blocks_cannot_serve(spans, window):
  q, k, v = qkv(spans, 16)
  slot = np.arange(16)
  distance = slot[:, None] - slot[None, :]
  plain = plain_of(q, k, v, (distance >= 0) & (distance < window))
  np.testing.assert_allclose(attended(q, k, v, window=window), plain, atol=2e-6)


@pytest.mark.parametrize("window", [0, 4])
def test_dropout_keeps_the_mean_and_is_off_without_a_key(window):
  q, k, v = qkv(spans=1)
  plain = attended(q, k, v, window=window)
  np.testing.assert_array_equal(attended(q, k, v, window=window, dropout=0.4), plain)
  keys = jax.random.split(jax.random.key(0), 1000)
  drop = jax.vmap(lambda key: attention(q, k, v, window=window, dropout=0.4, dropout_key=key))
  drawn = jax.jit(drop)(keys)
  assert np.abs(drawn[0] - drawn[1]).max() > 0.1
  error = np.abs(drawn.mean(axis=0) - plain)
  assert (error < 5 * drawn.std(axis=0) / np.sqrt(len(keys)) + 1e-6).all()


def test_an_implementation_that_cannot_serve_says_why():
  with pytest.raises(ConfigError, match=r"attention=cudnn cannot serve here: .*cpu"):
    attention(*qkv(spans=1), implementation="cudnn")
