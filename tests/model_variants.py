"""Tiny models, one for every option, that the proofs run over, with parameters drawn so that every one matters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.config import Level, MegabyteConfig, ModelConfig, PerceiverARConfig
from megabyte_jax.models.build import Model, abstract_model


def _level(patch_size: int, width: int, layers: int = 2, **options) -> Level:
  return Level(patch_size=patch_size, width=width, num_layers=layers, **{"num_heads": 2, **options})


def _megabyte(context: int, *levels: Level, **options) -> MegabyteConfig:
  # One value more than there are bytes: a text can then hold each value once, and one value never.
  return MegabyteConfig(context=context, levels=levels, vocab_size=context + 1, dropout=0.0, **options)


def _perceiver(context: int, latents: int, **options) -> PerceiverARConfig:
  sizes = {"width": 8, "num_layers": 2, "num_heads": 2}
  return PerceiverARConfig(
    context=context, latents=latents, vocab_size=context + 1, dropout=0.0, **{**sizes, **options}
  )


def _cross(r: int) -> dict[str, Any]:
  return {"cross_patch": r, "rotary": True}


VARIANTS: dict[str, ModelConfig] = {
  "two_levels": _megabyte(24, _level(4, 16), _level(1, 8)),
  "transformer": _megabyte(16, _level(1, 8)),
  "without_local": _megabyte(16, _level(4, 16)),
  "without_global": _megabyte(16, _level(1, 8), span=4),
  "without_global_cross_patch": _megabyte(16, _level(1, 8, **_cross(4)), span=4),
  "without_global_short_cross_patch": _megabyte(16, _level(1, 8, conv_filters=(2,), **_cross(1)), span=4),
  "three_levels": _megabyte(32, _level(8, 16, 1), _level(2, 8), _level(1, 6, 1)),
  "three_levels_cross_patch": _megabyte(32, _level(8, 16), _level(2, 8, 2, **_cross(3)), _level(1, 8, 2, **_cross(2))),
  "cross_patch": _megabyte(24, _level(4, 16, 1), _level(1, 8, 3, **_cross(4))),
  "short_cross_patch": _megabyte(16, _level(4, 16), _level(1, 8, **_cross(2))),
  "conv": _megabyte(24, _level(4, 16, conv_filters=(3, 5, 7)), _level(1, 8)),
  "conv_below": _megabyte(16, _level(4, 16), _level(1, 8, conv_filters=(3, 2))),
  "last_level_of_patches": _megabyte(16, _level(8, 16), _level(2, 8, 1, **_cross(2))),
  "without_global_cross_patch_conv": _megabyte(16, _level(2, 8, conv_filters=(3, 4), **_cross(3)), span=8),
  "window": _megabyte(16, _level(1, 8, attention_window=4)),
  "uneven_window": _megabyte(16, _level(1, 8, attention_window=5, rotary=True, conv_filters=(3,))),
  "two_windows": _megabyte(24, _level(4, 16, attention_window=2), _level(1, 8, attention_window=3)),
  "rmsnorm_without_bias": _megabyte(
    16, _level(4, 16, conv_filters=(3,)), _level(1, 8, **_cross(4)), norm="rmsnorm", bias=False, activation="silu"
  ),
  "odd_sizes": _megabyte(
    18,
    _level(3, 15, num_heads=3, head_dim=6, ff_width=10, rotary=True),
    _level(1, 7, head_dim=4, ff_width=9, rotary=True),
    activation="gelu",
  ),
  "swiglu": _megabyte(24, _level(4, 16), _level(1, 8), activation="swiglu"),
  "qk_norm": _megabyte(24, _level(4, 16), _level(1, 8), qk_norm=True),
  "modern": _megabyte(
    16,
    _level(4, 16, rotary=True),
    _level(1, 8, ff_width=12, **_cross(3)),
    norm="rmsnorm",
    bias=False,
    activation="swiglu",
    qk_norm=True,
    logit_scale="width",
  ),
  "own_output": _megabyte(16, _level(8, 16), _level(2, 8), tied_output=False),
  "perceiver_ar": _perceiver(20, 8),
  "perceiver_ar_rotary": _perceiver(20, 8, rotary=True, head_dim=6, ff_width=12, tied_output=False),
  "perceiver_ar_all_latents": _perceiver(12, 12),
  "perceiver_ar_modern": _perceiver(20, 8, rotary=True, activation="swiglu", qk_norm=True, logit_scale="width"),
}

every_variant = list(VARIANTS)

# Whose options others have, too; where a proof is expensive these are left to `pytest -m slow`.
_COMBINED_ELSEWHERE = (
  "three_levels",
  "short_cross_patch",
  "conv_below",
  "without_global",
  "without_global_cross_patch",
  "without_global_cross_patch_conv",
  "uneven_window",
  "rmsnorm_without_bias",
  "swiglu",
  "qk_norm",
  "perceiver_ar_rotary",
  "perceiver_ar_modern",
  "perceiver_ar_all_latents",
)
every_variant_in_time = [
  pytest.param(name, marks=pytest.mark.slow) if name in _COMBINED_ELSEWHERE else name for name in VARIANTS
]


def is_perceiver(config: ModelConfig) -> bool:
  return isinstance(config, PerceiverARConfig)


def draw_parameters(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
  """Large random values everywhere, biases and norm scales too: whatever a computation forgets is then seen."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    spread = {"table": 0.7, "output": 0.7, "positions": 0.5, "pad": 0.7, "bias": 0.3, "scale": 0.3}.get(name, 0.35)
    values = (name == "scale") + spread * rng.standard_normal(leaf.shape)
    return jnp.asarray(values.astype(np.float32))  # NumPy's cast: JAX would compile one for each shape

  return jax.tree_util.tree_map_with_path(draw, abstract_model(config)[1])


@functools.cache
def parameters(name: str) -> dict[str, Any]:
  return draw_parameters(VARIANTS[name])


@functools.cache
def model(name: str) -> Model:
  return nnx.merge(abstract_model(VARIANTS[name])[0], parameters(name))


@functools.cache
def _forward(name: str):
  graph = abstract_model(VARIANTS[name])[0]
  return jax.jit(lambda parameters, x_BT: nnx.merge(graph, parameters)(x_BT))


def logits(name: str, x_BT: np.ndarray, changed: dict[str, Any] | None = None) -> np.ndarray:
  """Of whole contexts, with the variant's parameters or `changed` ones.

  Rows are worked through `context` at a time, so that all proofs share one compilation.
  """
  context = VARIANTS[name].context
  x_BT = np.asarray(x_BT)
  assert x_BT.shape[1] == context
  padded = np.pad(x_BT, ((0, -len(x_BT) % context), (0, 0)))
  parts = [_forward(name)(changed or parameters(name), part) for part in padded.reshape(-1, context, context)]
  return np.concatenate(parts)[: len(x_BT)]


def distinct_bytes(name: str, seed: int = 0) -> np.ndarray:
  """A text of the context's length in which no value comes twice; the last value of the vocabulary is not in it."""
  return np.random.default_rng(seed).permutation(VARIANTS[name].context).astype(np.int32)


def random_bytes(name: str, rows: int, seed: int = 0) -> np.ndarray:
  config = VARIANTS[name]
  return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, config.context)).astype(np.int32)
