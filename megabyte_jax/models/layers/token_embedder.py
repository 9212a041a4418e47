"""Embeds the tokens of a segment, without positions, and gives the output.

Shapes: B batch, T tokens of a segment, D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.config import BlockOptions
from megabyte_jax.models.layers.embedding_lookup import logits_of, lookup
from megabyte_jax.models.parameters import compute_dtype, make_output, make_parameter


class TokenEmbedder(nnx.Module):
  """A table of tokens, which may be the output's, too, and a pad that stands before a document's first token."""

  def __init__(self, vocab_size: int, width: int, options: BlockOptions, rngs: nnx.Rngs, *, scale: float = 1.0):
    """Makes the table and the pad; `scale` multiplies what is embedded, not the output."""
    self.scale, self.dtype = scale, compute_dtype(options)
    self.logit_scale = width**-0.5 if options.logit_scale == "width" else 1.0
    self.table = make_parameter("table", {"vocab": vocab_size, "byte_width": width}, options, rngs)
    self.pad = make_parameter("pad", {"byte_width": width}, options, rngs)
    self.output = make_output(vocab_size, width, options, rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Embeds tokens [...] int32, of which -1 stands for none, as [..., D] in the compute dtype."""
    embedded = lookup(self.table[...], jnp.maximum(tokens, 0), self.dtype)
    return jnp.where((tokens < 0)[..., None], self.pad.astype(self.dtype), embedded) * self.scale

  def inputs(self, x_BT: jax.Array, previous_B: jax.Array) -> jax.Array:
    """Embeds the token before each of a segment, [B, T, D]: `previous_B` comes before the first."""
    return self(jnp.concatenate([previous_B[:, None], x_BT[:, :-1].astype(jnp.int32)], axis=1))

  def logits(self, h: jax.Array) -> jax.Array:
    """Multiplies hidden states [..., D] with the table or `output`; float32 [..., V]."""
    table = self.table if self.output is None else self.output
    return logits_of(h, table.astype(self.dtype), self.logit_scale)
