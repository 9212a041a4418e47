"""Turns bytes into the input slots of a level, eqs. (1) and (2), and its output into logits, eq. (6).

Shapes: B batch, N spans, L bytes of a span, M slots of a span, S bytes of a slot, d width of a byte,
D = S * d width of a slot, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from megabyte_jax.config import BlockOptions, Level
from megabyte_jax.config.model import check_bytes
from megabyte_jax.errors import require
from megabyte_jax.models.layers.attention import shift
from megabyte_jax.models.layers.embedding_lookup import logits_of, lookup
from megabyte_jax.models.parameters import compute_dtype, make_output, make_parameter
from megabyte_jax.parallel.activation_layout import refuse_explicit_axes


class CausalConv(nnx.Module):
  """One layer of the convolutional patch encoder: h + relu(causal convolution of h) over a span's bytes."""

  def __init__(self, size: int, patch_size: int, width: int, options: BlockOptions, rngs: nnx.Rngs):
    self.size, self.patch_size, self.dtype = size, patch_size, compute_dtype(options)
    sizes = {"taps": size, "channels_in": width, "channels": width}
    self.kernel = make_parameter("convolution", sizes, options, rngs, inputs=("taps", "channels_in"))
    self.bias = make_parameter("bias", {"channels": width}, options, rngs) if options.bias else None

  def __call__(self, h_BNLd: jax.Array, left_BNFd: jax.Array | None = None) -> jax.Array:
    """Convolves so that byte t of the result depends on bytes t - size + 1 .. t of its span.

    `left` holds the F = size - 1 bytes before, in stepwise decoding; without it the span starts here, and L must be a
    multiple of the patch size.
    """
    if left_BNFd is not None:
      return self._after(left_BNFd, h_BNLd)
    B, N, L, d = h_BNLd.shape
    piece = self._piece(L)
    h_BNCSd = h_BNLd.reshape(B, N, L // piece, piece, d)
    if piece == L:
      left_BNCFd = jnp.zeros((B, N, 1, self.size - 1, d), h_BNLd.dtype)
    else:
      left_BNCFd = shift(h_BNCSd[..., piece - self.size + 1 :, :], axis=2)
    return self._after(left_BNCFd, h_BNCSd).reshape(h_BNLd.shape)

  def _piece(self, length: int) -> int:
    """The fewest whole patches, as bytes, that hold size - 1 bytes and divide `length`; or all.

    A span is worked on in pieces, each with the end of the one before, so that devices that share a sequence
    exchange these ends and nothing else.
    """
    pieces = range(self.patch_size, length, self.patch_size)
    return next((piece for piece in pieces if piece >= self.size - 1 and length % piece == 0), length)

  def _after(self, left: jax.Array, h: jax.Array) -> jax.Array:
    """The layer over bytes h [..., L, d] that follow left [..., F, d].

    Products of shifted bytes, not XLA's convolution: over a mesh with fsdp, seq and tensor XLA splits that one
    wrongly (JAX 0.10).
    """
    x, length = jnp.concatenate([left, h], axis=-2), h.shape[-2]
    kernel = self.kernel.astype(self.dtype)
    products = (
      jnp.einsum("...i,io->...o", x[..., k : k + length, :], kernel[k], preferred_element_type=jnp.float32)
      for k in range(self.size)
    )
    y = functools.reduce(jnp.add, products)
    if self.bias is not None:
      y += self.bias[...]
    return h + jax.nn.relu(y).astype(self.dtype)


class PatchEmbedder(nnx.Module):
  """A level's byte table and byte positions, its pad, and its optional convolutional encoder and output matrix."""

  def __init__(
    self, level: Level, span: int, vocab_size: int, options: BlockOptions, rngs: nnx.Rngs, *, predicts: bool
  ):
    """Makes the parameters; a level that `predicts` may have an output matrix beside its table."""
    self.patch_size, self.dtype = level.patch_size, compute_dtype(options)
    width = level.byte_width
    self.logit_scale = width**-0.5 if options.logit_scale == "width" else 1.0
    self.table = make_parameter("table", {"vocab": vocab_size, "byte_width": width}, options, rngs)
    self.positions = make_parameter("positions", {"positions": span, "byte_width": width}, options, rngs)
    self.pad = make_parameter("pad", {"patch": level.patch_size, "byte_width": width}, options, rngs)
    self.output = make_output(vocab_size, width, options, rngs) if predicts else None
    self.convolutions = nnx.List(
      [CausalConv(size, level.patch_size, width, options, rngs) for size in level.conv_filters]
    )

  def embed(self, bytes_BNL: jax.Array, first_byte: jax.Array | int = 0) -> jax.Array:
    """Computes eq. (1), h_embed[t] = E[x_t] + E_pos[t], for L bytes of each span from `first_byte` on; [B, N, L, d]."""
    length = bytes_BNL.shape[-1]
    positions_Ld = jax.lax.dynamic_slice_in_dim(self.positions[...], first_byte, length)
    return lookup(self.table[...], bytes_BNL, self.dtype) + positions_Ld.astype(self.dtype)

  def slots(self, bytes_BNL: jax.Array) -> jax.Array:
    """Computes eq. (2): slot 0 is the pad, slot j the concatenated embeddings of patch j - 1; [B, N, M, D].

    L must be a multiple of S. The last patch is not used. The local model's slots (eq. 4) are made in the same way; its
    equation leaves out the learned positions (see Decisions in docs/design.md).
    """
    h_BNLd = self.embed(bytes_BNL)
    for convolution in self.convolutions:  # section 2.3.1, before chunking
      h_BNLd = convolution(h_BNLd)
    B, N, L, _ = h_BNLd.shape
    h_BNMD = h_BNLd.reshape(B, N, L // self.patch_size, -1)
    is_first_M1 = (jnp.arange(h_BNMD.shape[2]) == 0)[:, None]
    return jnp.where(is_first_M1, self.pad_slot(), shift(h_BNMD, axis=2))

  def pad_slot(self) -> jax.Array:
    """Returns the pad as one slot, [D]."""
    return self.pad.reshape(-1).astype(self.dtype)

  def logits(self, h: jax.Array) -> jax.Array:
    """Computes eq. (6): the output of each byte, [..., d], times the byte table or `output`; float32 [..., V]."""
    table = self.table if self.output is None else self.output
    return logits_of(h, table.astype(self.dtype), self.logit_scale)

  # Stepwise decoding: the convolutions remember the bytes before the patch at hand.

  def empty_memory(self, batch: int) -> tuple[jax.Array, ...]:
    """Returns the memory of each convolution at the start of a span: zeros, [B, 1, size - 1, d]."""
    width = self.table.shape[1]
    return tuple(jnp.zeros((batch, 1, c.size - 1, width), self.dtype) for c in self.convolutions)

  def memory_at(self, bytes_BL: jax.Array, at: jax.Array) -> tuple[jax.Array, ...]:
    """Computes the memory just before byte `at` of a span that starts with `bytes_BL`."""
    h_B1Ld, memory = self.embed(bytes_BL[:, None]), []
    for convolution in self.convolutions:
      padded = jnp.pad(h_B1Ld, ((0, 0), (0, 0), (convolution.size - 1, 0), (0, 0)))
      memory.append(jax.lax.dynamic_slice_in_dim(padded, at, convolution.size - 1, axis=2))
      h_B1Ld = convolution(h_B1Ld)
    return tuple(memory)

  def next_slot(
    self, previous_BS: jax.Array, memory: tuple[jax.Array, ...], slot: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Makes slot number `slot` as `slots` does, from the S bytes before it: [B, 1, 1, D], and the memory after them."""
    is_first = slot == 0
    h_B1Sd = self.embed(previous_BS[:, None], jnp.maximum(slot - 1, 0) * self.patch_size)
    new_memory = []
    for convolution, left in zip(self.convolutions, memory, strict=True):
      seen = jnp.concatenate([left, h_B1Sd], axis=2)
      new_memory.append(jnp.where(is_first, left, seen[:, :, seen.shape[2] - convolution.size + 1 :]))
      h_B1Sd = convolution(h_B1Sd, left)
    h_B11D = h_B1Sd.reshape(h_B1Sd.shape[0], 1, 1, -1)
    return jnp.where(is_first, self.pad_slot(), h_B11D), tuple(new_memory)


def check_input(x_BT: jax.Array, context: int, vocab_size: int) -> None:
  """Checks what a model is given, as far as shapes and types tell; the numbers, too, where they are at hand.

  Raises:
    ConfigError: x_BT is not a batch of 1 to `context` integers below `vocab_size`, or is on a mesh with Explicit axes.
  """
  require(hasattr(x_BT, "shape"), f"the input is of type {type(x_BT).__name__}; give an array [batch, bytes]")
  shape = x_BT.shape
  require(
    len(shape) == 2,
    f"the input has the shape {shape}; give [batch, bytes]" + (", such as x[None]" if len(shape) == 1 else ""),
  )
  require(shape[0] >= 1, "the batch is empty; give at least one row")
  check_length(shape[1], context)
  require(jnp.issubdtype(x_BT.dtype, jnp.integer), f"the input has the type {x_BT.dtype}; bytes are integers")
  refuse_explicit_axes(x_BT, "the input lies")
  if not isinstance(x_BT, jax.core.Tracer) and getattr(x_BT, "is_fully_addressable", True):
    check_bytes(np.asarray(x_BT), vocab_size)


def check_length(length: int, context: int) -> None:
  """Raises ConfigError unless 1 <= length <= context."""
  require(1 <= length <= context, f"the input has {length} bytes; the model takes 1 to {context} (model.context)")
