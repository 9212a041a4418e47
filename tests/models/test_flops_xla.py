"""`dense` FLOPs against XLA's own count of an unscanned forward pass, for every model and option."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from megabyte_jax.config import Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.models import flops
from megabyte_jax.models.build import abstract_model

BATCH = 2


def level(patch_size, width, num_layers, num_heads=4, **options):
  return Level(patch_size=patch_size, width=width, num_layers=num_layers, num_heads=num_heads, **options)


def megabyte(*levels, **options):
  return MegabyteConfig(context=512, levels=levels, **options)


def perceiver(context, latents, **options):
  return PerceiverARConfig(context=context, latents=latents, width=256, num_layers=2, num_heads=4, **options)


GLOBAL, LOCAL = level(8, 512, 2), level(1, 256, 3)
ROTARY = {"rotary": True, "cross_patch": 8}

MODELS = {
  "transformer": megabyte(level(1, 256, 2)),
  "transformer with a window": megabyte(level(1, 256, 2, attention_window=64)),
  "transformer with a window that does not divide": megabyte(level(1, 256, 2, attention_window=100)),
  "megabyte": megabyte(GLOBAL, LOCAL),
  "cross-patch attention": megabyte(GLOBAL, dataclasses.replace(LOCAL, **ROTARY)),
  "half cross-patch attention": megabyte(GLOBAL, dataclasses.replace(LOCAL, rotary=True, cross_patch=4)),
  "window in the local model": megabyte(GLOBAL, dataclasses.replace(LOCAL, attention_window=4)),
  "convolutional encoder": megabyte(level(4, 1024, 2, conv_filters=(3, 5, 7)), LOCAL),
  "three levels": megabyte(level(64, 4096, 1), GLOBAL, LOCAL),
  "without a local model": megabyte(level(4, 1024, 2)),
  "without a global model": megabyte(level(1, 256, 2, **ROTARY), span=8),
  "head and feed-forward widths": megabyte(
    level(8, 512, 2, 3, head_dim=64, ff_width=1024), level(1, 256, 3, 3, head_dim=128)
  ),
  "no biases, RMSNorm, GELU": megabyte(GLOBAL, LOCAL, norm="rmsnorm", bias=False, activation="gelu"),
  "SwiGLU": megabyte(GLOBAL, LOCAL, activation="swiglu"),
  "SwiGLU of a given width": megabyte(
    level(8, 512, 2, ff_width=1024), level(1, 256, 3), activation="swiglu", bias=False
  ),
  "QK-norm": megabyte(GLOBAL, LOCAL, qk_norm=True),
  "smaller vocabulary": megabyte(GLOBAL, LOCAL, vocab_size=64),
  "perceiver_ar with a prefix": perceiver(512, 128),
  "perceiver_ar, rotary": perceiver(512, 128, rotary=True),
  "perceiver_ar, SwiGLU and QK-norm": perceiver(512, 128, activation="swiglu", qk_norm=True),
  "perceiver_ar without a prefix": perceiver(256, 256),
}


@pytest.mark.parametrize("name", MODELS)
def test_dense_count_is_xlas(name):
  config = dataclasses.replace(MODELS[name], scan_layers="never", compute_dtype="float32")
  graph, state = abstract_model(config)
  x_BT = jax.ShapeDtypeStruct((BATCH, config.context), jnp.int32)
  lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x_BT)
  predicted = BATCH * (config.context if isinstance(config, MegabyteConfig) else config.latents)
  ours = flops.flops_per_byte(config, attention="dense") * predicted
  assert lowered.cost_analysis()["flops"] == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_the_models(name):
  parameters = abstract_model(MODELS[name])[1]
  assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == MODELS[name].parameter_count()
