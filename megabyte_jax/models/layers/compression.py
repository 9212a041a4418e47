"""Compresses the slots of one layer: the functions f_c of the Compressive Transformer (arXiv 1911.05507).

Shapes: B batch, T slots to compress, c slots that become one, J = T / c, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.config.compressive_transformer import DILATED_TAPS, CompressiveTransformerConfig
from megabyte_jax.models.parameters import compute_dtype, make_parameter


class LearnedCompression(nnx.Module):
  """A convolution of kernel and stride c; if dilated, after one that looks at the slots of the neighbours, too."""

  def __init__(self, config: CompressiveTransformerConfig, rngs: nnx.Rngs):
    self.rate, self.dtype = config.compression_rate, compute_dtype(config)

    def make(taps):
      sizes = {"taps": taps, "channels": config.width, "width": config.width}
      kernel = make_parameter("convolution", sizes, config, rngs, inputs=("taps", "channels"))
      return kernel, make_parameter("bias", {"channels": config.width}, config, rngs) if config.bias else None

    self.kernel, self.bias = make(self.rate)
    self.is_dilated = config.compression == "dilated_convolution"
    if self.is_dilated:
      self.dilated_kernel, self.dilated_bias = make(DILATED_TAPS)

  def __call__(self, old_BTD: jax.Array) -> jax.Array:
    """Returns the compressed slots, [B, J, D]."""
    if self.is_dilated:  # slots c before and c after, zeros beyond the ends
      T, reach = old_BTD.shape[1], self.rate * (DILATED_TAPS // 2)
      padded = jnp.pad(old_BTD, ((0, 0), (reach, reach), (0, 0)))
      taps_BTkD = jnp.stack([padded[:, k * self.rate :][:, :T] for k in range(DILATED_TAPS)], axis=2)
      old_BTD += jax.nn.relu(self._product(taps_BTkD, self.dilated_kernel, self.dilated_bias))
    return self._product(groups(old_BTD, self.rate), self.kernel, self.bias)

  def _product(self, taps_BJkD: jax.Array, kernel: nnx.Param, bias: nnx.Param | None) -> jax.Array:
    y = jnp.einsum("BJkd,kdD->BJD", taps_BJkD, kernel.astype(self.dtype))
    return y if bias is None else y + bias.astype(self.dtype)


def groups(old_BTD: jax.Array, rate: int) -> jax.Array:
  """Returns the slots in groups of c, [B, J, c, D]."""
  B, T, D = old_BTD.shape
  return old_BTD.reshape(B, T // rate, rate, D)


def compress_without_parameters(kind: str, old_BTD: jax.Array, use_BT: jax.Array | None, rate: int) -> jax.Array:
  """Returns the compressed slots, [B, J, D].

  Args:
    kind: mean | max | most_used.
    use_BT: the attention that the slots got, for most_used.
  """
  if kind == "mean":
    return jnp.mean(groups(old_BTD, rate), axis=2)
  if kind == "max":
    return jnp.max(groups(old_BTD, rate), axis=2)
  assert use_BT is not None
  _, most_BJ = jax.lax.top_k(use_BT, old_BTD.shape[1] // rate)
  return jnp.take_along_axis(old_BTD, jnp.sort(most_BJ, axis=-1)[..., None], axis=1)
