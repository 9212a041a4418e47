"""Computes nats of bytes. Everything that trains or evaluates sums nats, counts bytes and divides last."""

from __future__ import annotations

import math
from typing import Any

import jax

from megabyte_jax.models.family import Model
from megabyte_jax.models.patch_embedder import check_input


def byte_nats(
  model: Model,
  x_BT: jax.Array,
  *,
  length_B: jax.Array | None = None,
  start_B: jax.Array | None = None,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes -ln p(x_t | x_<t) of every byte that the model predicts.

  Args:
    x_BT: bytes.
    length_B: bytes of each row that count; the rest is padding. Default: all.
    start_B: families with latents only: where each row's latents start. Default: as far back as their number allows.
    dropout_key: turns dropout on.

  Returns:
    nats_BT: float32, 0 where nothing is predicted.
    scored_BT: bool, True where a byte is predicted: all of a row's bytes for MEGABYTE and the
      Transformer, those at the latents for PerceiverAR.

  Raises:
    ConfigError: x_BT is not a batch of bytes of the model; within jit numbers are not looked at.
  """
  check_input(x_BT, model.config.context, model.config.vocab_size)
  return model.byte_nats(x_BT, length_B=length_B, start_B=start_B, dropout_key=dropout_key)


def sum_of_nats(
  model: Model,
  x_BT: jax.Array,
  *,
  length_B: jax.Array | None = None,
  start_B: jax.Array | None = None,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes the sum of `byte_nats`, float32, and the number of bytes scored: what training differentiates.

  With `patch_groups` neither the logits nor the activations of all bytes are in memory together.
  """
  check_input(x_BT, model.config.context, model.config.vocab_size)
  return model.sum_of_nats(x_BT, length_B=length_B, start_B=start_B, dropout_key=dropout_key)


def segment_nats(
  model: Model,
  memory: Any,
  x_BT: jax.Array,
  *,
  fresh_B: jax.Array | None = None,
  length_B: jax.Array | None = None,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
  """Computes the nats of the next segment of each row, given a recurrent model's memory; see `Model.segment`.

  Returns:
    nats_BT and scored_BT as `byte_nats`; the memory afterwards; the sum of the family's own loss, float32.
  """
  check_input(x_BT, model.config.context, model.config.vocab_size)
  return model.segment_nats(memory, x_BT, fresh_B=fresh_B, length_B=length_B, dropout_key=dropout_key)


def bits_per_byte(nats: Any, count: Any) -> Any:
  """Returns bits per byte from the summed nats of `count` bytes: numbers, or arrays of equal shape; nan of 0 bytes."""
  if isinstance(count, (int, float)) and not count:
    return math.nan
  return nats / count / math.log(2)
