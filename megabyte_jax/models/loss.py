"""Nats of bytes. Everything that trains or evaluates sums nats, counts bytes and divides last."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megabyte_jax.config.model import check_bytes
from megabyte_jax.models.build import Model
from megabyte_jax.models.patch_groups import grouped_nats, grouped_sum_of_nats
from megabyte_jax.models.perceiver_ar import PerceiverAR


def byte_nats(
  model: Model,
  x_BT: jax.Array,
  *,
  length_B: jax.Array | None = None,
  start_B: jax.Array | None = None,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """-ln p(x_t | x_<t) of every byte that the model predicts.

  Args:
    x_BT: bytes.
    length_B: bytes of each row that count; the rest is padding. Default: all.
    start_B: PerceiverAR only: where each row's latents start. Default: as far back as their number allows.
    dropout_key: turns dropout on.

  Returns:
    nats_BT: float32, 0 where nothing is predicted.
    scored_BT: bool, True where a byte is predicted: all of a row's bytes for MEGABYTE and the
      Transformer, those at the latents for PerceiverAR.

  Raises:
    ConfigError: x_BT has a number that is no byte of the model; not looked for within jit.
  """
  B, T = x_BT.shape
  if not isinstance(x_BT, jax.core.Tracer) and getattr(x_BT, "is_fully_addressable", True):
    check_bytes(np.asarray(x_BT), model.config.vocab_size)
  scored_BT = _scored(x_BT, length_B)
  if not isinstance(model, PerceiverAR):
    if model.config.patch_groups > 1 and dropout_key is None:
      nats_BT = grouped_nats(model, _nats, x_BT)
    else:
      nats_BT = _nats(model(x_BT, dropout_key=dropout_key), x_BT)
    return jnp.where(scored_BT, nats_BT, 0.0), scored_BT
  N = min(model.config.latents, T)
  if start_B is None and length_B is not None:
    start_B = jnp.clip(length_B - N, 0, T - N)
  logits_BNV = model(x_BT, start_B=start_B, dropout_key=dropout_key)
  at_BN = (jnp.full((B,), T - N) if start_B is None else start_B)[:, None] + jnp.arange(N)
  rows = jnp.arange(B)[:, None]
  nats_BN = _nats(logits_BNV, jnp.take_along_axis(x_BT, at_BN, axis=1))
  scored_BT &= jnp.zeros((B, T), bool).at[rows, at_BN].set(True)
  return jnp.where(scored_BT, jnp.zeros((B, T), jnp.float32).at[rows, at_BN].set(nats_BN), 0.0), scored_BT


def sum_of_nats(
  model: Model,
  x_BT: jax.Array,
  *,
  length_B: jax.Array | None = None,
  start_B: jax.Array | None = None,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The sum of `byte_nats`, float32, and the number of bytes scored: what training differentiates.

  With `patch_groups` neither the logits nor the activations of all bytes are in memory together.
  """
  if isinstance(model, PerceiverAR) or model.config.patch_groups == 1:
    nats_BT, scored_BT = byte_nats(model, x_BT, length_B=length_B, start_B=start_B, dropout_key=dropout_key)
    return jnp.sum(nats_BT), jnp.sum(scored_BT)
  scored_BT = _scored(x_BT, length_B)
  return grouped_sum_of_nats(model, _nats, x_BT, scored_BT, dropout_key), jnp.sum(scored_BT)


def _scored(x_BT: jax.Array, length_B: jax.Array | None) -> jax.Array:
  B, T = x_BT.shape
  return jnp.ones((B, T), bool) if length_B is None else jnp.arange(T) < length_B[:, None]


def _nats(logits_BTV: jax.Array, x_BT: jax.Array) -> jax.Array:
  """Cross-entropy in float32; the one-hot sum keeps the gradient free of scatters."""
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  one_hot = jnp.arange(logits_BTV.shape[-1]) == x_BT[..., None]
  return log_z_BT - jnp.sum(jnp.where(one_hot, logits_BTV, 0.0), axis=-1)


def bits_per_byte(nats: Any, count: Any) -> Any:
  """Bits per byte from the summed nats of `count` bytes: numbers, or arrays of equal shape."""
  return nats / count / math.log(2)
