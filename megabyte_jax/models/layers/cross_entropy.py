"""Computes nats from logits, also of vocabularies so large that the logits of all tokens would fill the memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

_LOGITS = 1 << 30  # that may be in memory together: 4 GiB


def cross_entropy(logits_BTV: jax.Array, x_BT: jax.Array) -> jax.Array:
  """Returns the nats of each byte, in float32; the one-hot sum keeps the gradient free of scatters."""
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  one_hot = jnp.arange(logits_BTV.shape[-1]) == x_BT[..., None]
  return log_z_BT - jnp.sum(jnp.where(one_hot, logits_BTV, 0.0), axis=-1)


def nats_of_outputs(
  logits: Callable[[jax.Array], jax.Array], h_BTd: jax.Array, x_BT: jax.Array, vocab_size: int
) -> jax.Array:
  """Returns the nats of each token from the model's output for it, float32 [B, T].

  Where there would be more than 2^30 logits they are made in parts, and again for the backward pass. Position t
  belongs to part t % parts, so that devices that share a sequence share every part.

  Args:
    logits: turns outputs [..., d] into float32 logits [..., V].
    h_BTd: outputs.
    x_BT: the tokens themselves.
    vocab_size: V.
  """
  B, T = x_BT.shape
  wanted = math.ceil(math.log2(max(1.0, B * T * vocab_size / _LOGITS)))
  parts = math.gcd(T, 1 << wanted) if vocab_size > 256 else 1  # logits of bytes are fewer than their outputs
  if parts == 1:
    return cross_entropy(logits(h_BTd), x_BT)

  def of_part(_, part):
    return None, cross_entropy(logits(part[0]), part[1])

  split = [jnp.moveaxis(a.reshape(B, T // parts, parts, *a.shape[2:]), 2, 0) for a in (h_BTd, x_BT)]
  _, nats_pBS = jax.lax.scan(jax.checkpoint(of_part, prevent_cse=False), None, tuple(split))
  return jnp.moveaxis(nats_pBS, 0, 2).reshape(B, T)
