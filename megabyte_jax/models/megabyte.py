"""MEGABYTE, read beside section 2 of the paper.

The model is a list of levels, from coarse to fine; the paper's global and local models are levels 1 and 2.
Level i cuts its input into spans of S_{i-1} bytes (S_0 is the context) and each span into M_i = S_{i-1} / S_i
slots of S_i bytes. It is a causal decoder over the slots of a span; spans are independent of each other.
The output of a slot is the input of the span of level i+1 that covers the same bytes.

Shapes: B batch, T bytes, N spans, M slots of a span, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.config import Level, MegabyteConfig
from megabyte_jax.models.layers import compute_dtype, init_normal
from megabyte_jax.models.patch_embedder import PatchEmbedder, check_length
from megabyte_jax.models.stack import Cache, Stack
from megabyte_jax.sharding import constrain


class LevelModel(nnx.Module):
  """One level: the patch embedder, the projection of the parent level's output, and the decoder."""

  def __init__(self, level: Level, span: int, parent_byte_width: int, config: MegabyteConfig, rngs: nnx.Rngs):
    self.span, self.slots_per_span = span, span // level.patch_size
    self.embedder = PatchEmbedder(level, span, config.vocab_size, config, rngs)
    if parent_byte_width:  # w_i, (S_i * d_{i-1}) x D_i, shared by all slots: w_GL of eq. (4) for the local model
      shape = (level.patch_size * parent_byte_width, level.width)
      self.from_parent = nnx.Param(init_normal(config)(rngs.params(), shape, jnp.float32))
    self.decoder = Stack(level, config, rngs)

  def add_parent(self, slots_BNMD: jax.Array, parent_BNP: jax.Array) -> jax.Array:
    """Eq. (4): to slot j of each span, slice j of the parent's output for that span, times w_i."""
    B, N, M, _ = slots_BNMD.shape
    slices_BNMs = parent_BNP.reshape(B, N, M, self.from_parent.shape[0])
    return slots_BNMD + slices_BNMs @ self.from_parent.astype(slots_BNMD.dtype)

  def __call__(self, x_BT: jax.Array, parent_BNP: jax.Array | None, **options) -> tuple[jax.Array, Any]:
    """Eqs. (1)-(3) for the first level, (4)-(5) for the others.

    Args:
      x_BT: whole spans of bytes, or the beginning of a single one.
      parent_BNP: the parent level's output for each span; None at the first level.
      options: passed on to the decoder, `Stack.__call__`.

    Returns:
      Hidden states [B, N, M, D], and what the decoder was asked to keep.
    """
    B, T = x_BT.shape
    slots_BNMD = self.embedder.slots(x_BT.reshape(B, -1, min(self.span, T)))
    if parent_BNP is not None:
      slots_BNMD = self.add_parent(slots_BNMD, parent_BNP)
    return self.decoder(constrain(slots_BNMD, "slots" if slots_BNMD.shape[1] == 1 else "spans"), **options)


def fold_level(dropout_key: jax.Array | None, i: int) -> jax.Array | None:
  """The dropout key of level i (from 0)."""
  return None if dropout_key is None else jax.random.fold_in(dropout_key, i)


def finer_levels(
  levels: Sequence[LevelModel], x_BT: jax.Array, h_BKD: jax.Array, dropout_key: jax.Array | None
) -> jax.Array:
  """Eqs. (4)-(6): logits [B, T, V] from the first level's output for each of the T / S_1 patches.

  Without cross-patch attention the patches need not be neighbours.
  """
  B, T = x_BT.shape
  for i, level in enumerate(levels[1:], start=1):
    h_BNMD, _ = level(x_BT, h_BKD, dropout_key=fold_level(dropout_key, i))
    h_BKD = h_BNMD.reshape(B, -1, h_BNMD.shape[-1])  # each slot is a span of the next level
  return levels[-1].embedder.logits(h_BKD.reshape(B, T, -1))  # the output of a slot, cut into those of its bytes


class DecodeState(NamedTuple):
  """What decoding remembers between patches of the first level.

  Attributes:
    caches: of each level, for the span at hand.
    memories: of each level's convolutional encoder.
    patch_BS: the S_1 bytes before the next patch.
    position: int32 scalar, bytes of the context so far; a multiple of S_1.
  """

  caches: tuple[Cache, ...]
  memories: tuple[tuple[jax.Array, ...], ...]
  patch_BS: jax.Array
  position: jax.Array


class ByteState(NamedTuple):
  """What decoding one byte at a time remembers.

  Attributes:
    decoded: caches, and in `patch_BS` the bytes since the start of the first level's slot at hand (before it, those of
      the slot before); `position` counts bytes.
    outputs_B11D: of each level, its slot at hand.
  """

  decoded: DecodeState
  outputs_B11D: tuple[jax.Array, ...]


class Megabyte(nnx.Module):
  """p(x_t | x_<t) for every byte of a sequence; see `MegabyteConfig` for the models it can be."""

  def __init__(self, config: MegabyteConfig, rngs: nnx.Rngs):
    self.config = config
    parents = (0, *(level.byte_width for level in config.levels))
    self.levels = nnx.List(
      LevelModel(level, span, parent, config, rngs)
      for level, span, parent in zip(config.levels, config.spans, parents, strict=False)
    )

  def __call__(self, x_BT: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits of every byte given the bytes before it.

    Args:
      x_BT: bytes, any integer dtype, 1 <= T <= context.
      dropout_key: turns dropout on.

    Returns:
      Float32 logits [B, T, V]; those at t depend on x_<t alone.

    Raises:
      ConfigError: T is 0 or longer than the context.
    """
    h_BKD = self.first_level(x_BT, dropout_key)
    padded_BT = jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % self.alignment)))
    return finer_levels(self.levels, padded_BT, h_BKD, dropout_key)[:, : x_BT.shape[1]]

  def first_level(self, x_BT: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Eqs. (1)-(3): the output of each patch of S_1 bytes given the patches before it, [B, K, D].

    A partly filled last patch, or last span if there are several, is padded to a whole one.

    Raises:
      ConfigError: T is 0 or longer than the context.
    """
    B, T = x_BT.shape
    check_length(T, self.config.context)
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % self.alignment)))
    h_BNMD, _ = self.levels[0](x_BT, None, dropout_key=fold_level(dropout_key, 0))
    return h_BNMD.reshape(B, -1, h_BNMD.shape[-1])

  @property
  def alignment(self) -> int:
    """Inputs are padded to a multiple of this many bytes: whole patches, or whole spans if there are several."""
    return self.config.alignment

  def _per_span(self, h_BNMD):
    """The output of each slot as the input of one span of the next level: [B, N * M, D]."""
    return None if h_BNMD is None else h_BNMD.reshape(h_BNMD.shape[0], -1, h_BNMD.shape[-1])

  # --- Decoding. Each byte costs one step of the last level, each patch one of the level above, and so on. ---

  def start_decoding(self, batch: int) -> DecodeState:
    """The state before the first byte."""
    return DecodeState(
      tuple(level.decoder.empty_cache(batch, level.slots_per_span) for level in self.levels),
      tuple(level.embedder.empty_memory(batch) for level in self.levels),
      jnp.zeros((batch, self.config.levels[0].patch_size), jnp.int32),
      jnp.int32(0),
    )

  def read_prompt(self, x_BT: jax.Array, length: jax.Array) -> DecodeState:
    """The state after the first `length` bytes, rounded down to `alignment`, all processed at once.

    Args:
      x_BT: the prompt and then anything; T a multiple of `alignment`, at most the context.
      length: int32 scalar, known bytes.
    """
    B, T = x_BT.shape
    check_length(T, self.config.context)
    patch, spans = self.config.levels[0].patch_size, self.config.spans
    position = length // self.alignment * self.alignment
    state = self.start_decoding(B)
    caches, memories, h_BNMD = [], [], None
    # A level below is needed only if cross-patch attention reads the end of its last span.
    deepest = max((i for i, level in enumerate(self.config.levels) if level.cross_patch), default=0)
    for i, (level, cache, span) in enumerate(zip(self.levels, state.caches, spans, strict=True)):
      whole = i == 0 and span == self.config.context
      if whole or i <= deepest:
        last_span = 0 if whole else jnp.maximum(position // span - 1, 0)

        def keep(k, v, last_span=last_span):
          return tuple(jax.lax.dynamic_slice_in_dim(a, last_span, 1, axis=1) for a in (k, v))

        h_BNMD, kept = level(x_BT, self._per_span(h_BNMD), keep=keep)
        r = self.config.levels[i].cross_patch
        cache = Cache(*(a.at[:, :, :, r : r + new.shape[3]].set(new) for a, new in zip(cache, kept, strict=True)))
      caches.append(cache)
      memories.append(level.embedder.memory_at(x_BT, jnp.maximum(position - patch, 0)) if whole else state.memories[i])
    patch_BS = jax.lax.dynamic_slice_in_dim(x_BT, jnp.maximum(position - patch, 0), patch, axis=1)
    return DecodeState(tuple(caches), tuple(memories), patch_BS.astype(jnp.int32), jnp.int32(position))

  def decode_patch(self, state: DecodeState, pick) -> tuple[DecodeState, jax.Array, jax.Array]:
    """The next S_1 bytes.

    Args:
      state: after the bytes before.
      pick: (logits [B, V], position) -> bytes [B] int32, called for one byte after the other.

    Returns:
      The state after them, the bytes [B, S_1], and the float32 logits [B, S_1, V] they were picked from.
    """
    B, patch = state.patch_BS.shape
    logits_BSV = jnp.zeros((B, patch, self.config.vocab_size), jnp.float32)
    slot = state.position % self.config.spans[0] // patch
    loop = (*self._begin_first(slot, state.caches, state.memories), jnp.zeros_like(state.patch_BS), logits_BSV)
    loop = self._decode_slot(0, slot, state.position, None, state.patch_BS, loop, state.position, pick)
    caches, memories, patch_BS, logits_BSV = loop
    return DecodeState(caches, memories, patch_BS, state.position + patch), patch_BS, logits_BSV

  def _decode_slot(self, i, slot, byte, parent_B11s, previous_BS, loop, patch_start, pick):
    """Slot number `slot` of level i, whose first byte is byte `byte` of the context; then the levels below."""
    caches, memories, bytes_BS, logits_BSV = loop
    level, config = self.levels[i], self.config.levels[i]
    B = bytes_BS.shape[0]
    h_B11D, cache, memory = self._step_level(i, slot, byte, parent_B11s, previous_BS, caches[i], memories[i])
    caches = (*caches[:i], cache, *caches[i + 1 :])
    memories = (*memories[:i], memory, *memories[i + 1 :])
    first = byte % bytes_BS.shape[1]  # where the slot's bytes lie in the patch of the first level
    if i == len(self.levels) - 1:
      logits = level.embedder.logits(h_B11D.reshape(B, config.patch_size, -1))
      logits_BSV = jax.lax.dynamic_update_slice_in_dim(logits_BSV, logits, first, axis=1)
      for s in range(config.patch_size):
        picked_B1 = pick(logits[:, s], byte + s)[:, None].astype(bytes_BS.dtype)
        bytes_BS = jax.lax.dynamic_update_slice_in_dim(bytes_BS, picked_B1, first + s, axis=1)
      return caches, memories, bytes_BS, logits_BSV

    below = self.config.levels[i + 1]
    parts_BMs = h_B11D.reshape(B, config.patch_size // below.patch_size, -1)

    def one_slot(j, loop):
      start = byte + j * below.patch_size
      before = jnp.maximum(start - below.patch_size - patch_start, 0)
      previous = jax.lax.dynamic_slice_in_dim(loop[2], before, below.patch_size, axis=1)
      part_B11s = jax.lax.dynamic_slice_in_dim(parts_BMs, j, 1, axis=1)[:, None]
      return self._decode_slot(i + 1, j, start, part_B11s, previous, loop, patch_start, pick)

    loop = (*self._begin_span(i + 1, caches, memories), bytes_BS, logits_BSV)
    return jax.lax.fori_loop(0, config.patch_size // below.patch_size, one_slot, loop)

  def _begin_span(self, i, caches, memories):
    """(caches, memories), of level i ready for the first slot of a span."""
    cache, memory = caches[i], jax.tree.map(jnp.zeros_like, memories[i])
    if self.config.levels[i].cross_patch:  # other caches need no preparation: of a new span nothing is visible yet
      cache = self.levels[i].decoder.next_span(cache)
    return (*caches[:i], cache, *caches[i + 1 :]), (*memories[:i], memory, *memories[i + 1 :])

  def _begin_first(self, slot, caches, memories):
    """The same for the first level, if slot number `slot` is the first of a span, of which it may have several."""
    if self.config.spans[0] == self.config.context:
      return caches, memories
    return jax.lax.cond(
      slot == 0, functools.partial(self._begin_span, 0), lambda *unchanged: unchanged, caches, memories
    )

  def _step_level(self, i, slot, byte, parent_B11s, previous_BS, cache, memory):
    """One step of level i alone: its output for the slot, and what it remembers."""
    level, config = self.levels[i], self.config.levels[i]
    x_B11D, memory = level.embedder.next_slot(previous_BS, memory, slot)
    if parent_B11s is not None:
      x_B11D = level.add_parent(x_B11D, parent_B11s)
    span_start = byte - slot * config.patch_size
    h_B11D, cache = level.decoder.step(x_B11D, cache, slot, span_start > 0)
    return h_B11D, cache, memory

  # Where each byte becomes known only outside of the compiled step, as in decompression. `decode_patch` is faster.

  def start_bytes(self, batch: int) -> ByteState:
    """The state before the first byte."""
    width = [level.width for level in self.config.levels]
    return ByteState(
      self.start_decoding(batch), tuple(jnp.zeros((batch, 1, 1, D), compute_dtype(self.config)) for D in width)
    )

  def first_level_at(self, position: int) -> int:
    """The coarsest level that has a slot starting at byte `position`; the number of levels where none has."""
    starts = (i for i, level in enumerate(self.config.levels) if position % level.patch_size == 0)
    return next(starts, len(self.levels))

  def decode_byte(self, state: ByteState, previous_B: jax.Array, first_level: int) -> tuple[ByteState, jax.Array]:
    """The logits of one byte, [B, V] float32, and the state for the next.

    Args:
      state: after the bytes before.
      previous_B: the byte before, int32; anything at position 0.
      first_level: `first_level_at` the byte's position.
    """
    (caches, memories, patch_BS, position), outputs = state
    B, patch = patch_BS.shape
    at = (position - 1) % patch
    patch_BS = jax.lax.dynamic_update_slice_in_dim(patch_BS, previous_B[:, None].astype(patch_BS.dtype), at, axis=1)
    if first_level == 0:
      caches, memories = self._begin_first(position % self.config.spans[0], caches, memories)
    for i in range(first_level + 1, len(self.levels)):  # below a new slot begins a new span
      caches, memories = self._begin_span(i, caches, memories)
    cache_of, memory_of, output_of = list(caches), list(memories), list(outputs)
    for i in range(first_level, len(self.levels)):
      size, span, part_B11s = self.config.levels[i].patch_size, self.config.spans[i], None
      if i > 0:
        parts_BMs = output_of[i - 1].reshape(B, span // size, -1)
        part_B11s = jax.lax.dynamic_slice_in_dim(parts_BMs, position % span // size, 1, axis=1)[:, None]
      previous_BS = jax.lax.dynamic_slice_in_dim(patch_BS, (position - size) % patch, size, axis=1)
      output_of[i], cache_of[i], memory_of[i] = self._step_level(
        i, position % span // size, position, part_B11s, previous_BS, cache_of[i], memory_of[i]
      )
    size = self.config.levels[-1].patch_size
    h_BSd = output_of[-1].reshape(B, size, -1)
    logits_B1V = self.levels[-1].embedder.logits(jax.lax.dynamic_slice_in_dim(h_BSd, position % size, 1, axis=1))
    decoded = DecodeState(tuple(cache_of), tuple(memory_of), patch_BS, position + 1)
    return ByteState(decoded, tuple(output_of)), logits_B1V[:, 0]
