"""On a GPU: fast attention and bfloat16 compute against the float32 reference, forward and backward.

JAX_PLATFORMS=cuda python -m pytest tests/test_accelerator.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megabyte_jax import Level, MegabyteConfig, PerceiverARConfig, byte_nats, generate, make_model
from megabyte_jax.models import attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda pytest ...")


def level(patch_size, width, **options):
  return Level(patch_size=patch_size, width=width, num_layers=2, num_heads=width // 64, **options)


MODELS = {
  "two levels": MegabyteConfig(context=1024, levels=(level(8, 512), level(1, 256))),
  "long patches": MegabyteConfig(context=1536, levels=(level(192, 768), level(1, 256))),
  "cross-patch": MegabyteConfig(context=1024, levels=(level(8, 512), level(1, 256, rotary=True, cross_patch=8))),
  "convolutions": MegabyteConfig(context=1024, levels=(level(8, 512, conv_filters=(3, 5, 7)), level(1, 256))),
  "Transformer": MegabyteConfig(context=512, levels=(level(1, 256),)),
  "sliding window": MegabyteConfig(context=512, levels=(level(1, 256, attention_window=128),)),
  "PerceiverAR": PerceiverARConfig(context=512, latents=128, width=256, num_layers=2, num_heads=4),
}


def with_options(config, **options):
  fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
  return type(config)(**{**fields, "dropout": 0.0, "init_std": 0.03, **options})


def loss_and_gradient(config, x_BT):
  graph, parameters = nnx.split(make_model(config, nnx.Rngs(0)))

  def mean_nats(parameters):
    nats_BT, scored_BT = byte_nats(nnx.merge(graph, parameters), x_BT)
    return nats_BT.sum() / scored_BT.sum()

  loss, gradient = jax.jit(jax.value_and_grad(mean_nats))(parameters)
  return float(loss), np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(gradient)])


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_and_fast_attention_follow_the_reference(name):
  config = MODELS[name]
  x_BT = jax.random.randint(jax.random.key(1), (2, config.context), 0, 256)
  with jax.default_matmul_precision("highest"):
    loss, gradient = loss_and_gradient(with_options(config, compute_dtype="float32", attention="xla"), x_BT)
  errors = []
  for options in ({"attention": "xla"}, {"attention": "auto"}, {"attention": "auto", "remat": "named"}):
    fast_loss, fast_gradient = loss_and_gradient(with_options(config, compute_dtype="bfloat16", **options), x_BT)
    assert abs(fast_loss - loss) < 2e-3 * loss, options
    errors.append(np.linalg.norm(fast_gradient - gradient) / np.linalg.norm(gradient))
  print(name, "relative error of the gradient: xla, auto, auto with recomputation", errors)
  assert errors[0] < 0.1  # bfloat16 itself, with random data and so next to no signal
  assert max(errors) < 1.2 * errors[0]  # fast attention adds nothing to it


@pytest.mark.parametrize("r", [0, 8])
def test_short_spans_equal_matrix_products(r):
  shape = (2, 16, 8, 4, 64)
  q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
  visible = jnp.tril(jnp.ones((8, 8), bool))
  past = None
  if r:
    past = attention.Past(*map(attention.previous_span, (k, v)), jnp.arange(16)[:, None, None] > 0)
  with jax.default_matmul_precision("highest"):
    exact = attention._xla(q, k, v, visible, past, 0.0, None)
    np.testing.assert_allclose(attention._short(q, k, v, visible, past), exact, atol=1e-5)


def test_generation_repeats_itself_and_has_finite_probabilities():
  model = make_model(with_options(MODELS["cross-patch"]), nnx.Rngs(0))
  first, second = (generate(model, b"It is", 1200, num_samples=2, seed=1) for _ in range(2))
  assert np.isfinite(first.nats).all() and first.nats.mean() < 8
  np.testing.assert_array_equal(first.bytes_, second.bytes_)
