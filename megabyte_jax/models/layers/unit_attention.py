"""Attends with queries and keys of unit length, a learned scale per head, and T5's relative positions.

Shapes: B batch, N windows, M queries of a window, S keys that they may see, H heads, K head width, D distances.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from megabyte_jax.config.block_recurrent import BUCKETS
from megabyte_jax.models.layers.dropout import dropout

FARTHEST = 128  # distances from here on share the last bucket


def unit(x: jax.Array) -> jax.Array:
  """Returns x divided by its length along the last axis; computed in float32."""
  x32 = x.astype(jnp.float32)
  return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def attend(
  q_BNMHK: jax.Array,
  k_BNSHK: jax.Array,
  v_BNSHK: jax.Array,
  scale_H: jax.Array,
  *,
  bias_HMS: jax.Array | None = None,
  visible: jax.Array | None = None,
  rate: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Attends with the scores scale * q . k + bias, in windows.

  Args:
    q_BNMHK, k_BNSHK: of unit length; N is 1 for those that all windows share.
    bias_HMS: added to the scores.
    visible: bool, broadcastable to [B, N, M, S]. A query that sees nothing gets zeros.
    rate, dropout_key: dropout on the probabilities; none without a key.

  Returns:
    The attended values, [B, N, M, H, K], in the dtype of q. The softmax is float32.
  """
  scores = jnp.einsum("BNMHK,BNSHK->BNHMS", q_BNMHK, k_BNSHK, preferred_element_type=jnp.float32)
  scores *= scale_H[:, None, None]
  if bias_HMS is not None:
    scores += bias_HMS
  if visible is not None:
    seen = visible[..., None, :, :]
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1)
  if visible is not None:
    weights = jnp.where(seen, weights, 0.0)
  weights = dropout(weights, rate, dropout_key).astype(q_BNMHK.dtype)
  return checkpoint_name(jnp.einsum("BNHMS,BNSHK->BNMHK", weights, v_BNSHK), "attended")


def bucket_of(distance: np.ndarray) -> np.ndarray:
  """Returns the bucket of each distance back (T5; Raffel et al., 2020): half of them exact, the others logarithmic."""
  exact = BUCKETS // 2
  far = np.log(np.maximum(distance, 1) / exact) / np.log(FARTHEST / exact)
  return np.where(distance < exact, distance, np.minimum(exact + (far * exact).astype(int), BUCKETS - 1)).astype(int)


def bias_by_distance(table_bH: jax.Array, distances: int) -> jax.Array:
  """Returns the bias [H, D] of distances 0 .. D - 1, by a product with one-hot rows: its gradient is no scatter."""
  one_hot_Db = bucket_of(np.arange(distances))[:, None] == np.arange(BUCKETS)
  return jnp.einsum("Db,bH->HD", one_hot_Db.astype(np.float32), table_bH, precision=jax.lax.Precision.HIGHEST)


def in_windows(bias_HD: jax.Array) -> jax.Array:
  """Lays the bias of distances 0 .. M - 1 out for a window of M queries and the 2 M keys of it and the one before.

  Query i and key j are M + i - j apart: each row is the one above, a place later. So the rows are pieces of one vector
  of length 3 M, repeated, which are one place shorter than it is. Where that is not a distance, the bias is 0.
  """
  H, M = bias_HD.shape
  vector_H = jnp.pad(bias_HD[:, ::-1], ((0, 0), (1, 2 * M - 1)))  # of row 0: distance M - 1 is at place 1
  repeated = jnp.broadcast_to(vector_H[:, None], (H, M, 3 * M)).reshape(H, -1)
  return repeated[:, : M * (3 * M - 1)].reshape(H, M, 3 * M - 1)[:, :, : 2 * M]
