"""Decodes byte by byte with caches: a byte costs one step of the last level, a patch one of the level above.

Shapes as in megabyte.py; S the S_1 bytes of a patch of the first level.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megabyte_jax.config import MegabyteConfig
from megabyte_jax.models.family import Model, Pick
from megabyte_jax.models.global_and_local import LevelModel
from megabyte_jax.models.layers.stack import Cache
from megabyte_jax.models.parameters import compute_dtype
from megabyte_jax.models.patch_embedder import check_length


class DecodeState(NamedTuple):
  """The state of decoding between patches of the first level.

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
  """The state of decoding one byte at a time.

  Attributes:
    decoded: caches, and in `patch_BS` the bytes since the start of the first level's slot at hand (before it, those of
      the slot before); `position` counts bytes.
    outputs_B11D: of each level, its slot at hand.
  """

  decoded: DecodeState
  outputs_B11D: tuple[jax.Array, ...]


class _Patch(NamedTuple):
  """A patch of the first level while it is decoded: what a loop over slots carries.

  Attributes:
    caches, memories: as in `DecodeState`.
    bytes_BS, logits_BSV: of the bytes so far.
  """

  caches: tuple[Cache, ...]
  memories: tuple[tuple[jax.Array, ...], ...]
  bytes_BS: jax.Array
  logits_BSV: jax.Array


class Decoding(Model):
  """Decodes: the half of `Megabyte` that does."""

  config: MegabyteConfig
  levels: Sequence[LevelModel]

  def start_decoding(self, batch: int) -> DecodeState:
    """Makes the state before the first byte."""
    return DecodeState(
      tuple(level.decoder.empty_cache(batch, level.slots_per_span) for level in self.levels),
      tuple(level.embedder.empty_memory(batch) for level in self.levels),
      jnp.zeros((batch, self.config.levels[0].patch_size), jnp.int32),
      jnp.int32(0),
    )

  def read_prompt(self, x_BT: jax.Array, length: jax.Array, latent_start: jax.Array | int = 0) -> DecodeState:
    """Computes the state after the first `length` bytes, rounded down to `alignment`, all processed at once.

    Args:
      x_BT: the prompt and then anything; T a multiple of `alignment`, at most the context.
      length: int32 scalar, known bytes.
      latent_start: of other families.
    """
    B, T = x_BT.shape
    check_length(T, self.config.context)
    patch, spans = self.config.levels[0].patch_size, self.config.spans
    position = length // self.config.alignment * self.config.alignment
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

        h_BNMD, kept = level(x_BT, None if h_BNMD is None else h_BNMD.reshape(B, -1, h_BNMD.shape[-1]), keep=keep)
        r = self.config.levels[i].cross_patch
        cache = Cache(*(a.at[:, :, :, r : r + new.shape[3]].set(new) for a, new in zip(cache, kept, strict=True)))
      caches.append(cache)
      memories.append(level.embedder.memory_at(x_BT, jnp.maximum(position - patch, 0)) if whole else state.memories[i])
    patch_BS = jax.lax.dynamic_slice_in_dim(x_BT, jnp.maximum(position - patch, 0), patch, axis=1)
    return DecodeState(tuple(caches), tuple(memories), patch_BS.astype(jnp.int32), jnp.int32(position))

  def decode_patch(self, state: DecodeState, pick: Pick) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Decodes the next S_1 bytes.

    Args:
      state: after the bytes before.
      pick: called for one byte after the other.

    Returns:
      The state after them, the bytes [B, S_1], and the float32 logits [B, S_1, V] they were picked from.
    """
    B, patch = state.patch_BS.shape
    logits_BSV = jnp.zeros((B, patch, self.config.vocab_size), jnp.float32)
    slot = state.position % self.config.spans[0] // patch
    caches, memories = self._begin_first(slot, state.caches, state.memories)
    begun = _Patch(caches, memories, jnp.zeros_like(state.patch_BS), logits_BSV)
    done = self._decode_slot(0, slot, state.position, None, state.patch_BS, begun, state.position, pick)
    after = DecodeState(done.caches, done.memories, done.bytes_BS, state.position + patch)
    return after, done.bytes_BS, done.logits_BSV

  def _decode_slot(
    self,
    i: int,
    slot: jax.Array,
    byte: jax.Array,
    parent_B11s: jax.Array | None,
    previous_BS: jax.Array,
    made: _Patch,
    patch_start: jax.Array,
    pick: Pick,
  ) -> _Patch:
    """Slot number `slot` of level i, whose first byte is byte `byte` of the context; then the levels below."""
    caches, memories, bytes_BS, logits_BSV = made
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
      return _Patch(caches, memories, bytes_BS, logits_BSV)

    below = self.config.levels[i + 1]
    parts_BMs = h_B11D.reshape(B, config.patch_size // below.patch_size, -1)

    def one_slot(j: jax.Array, made: _Patch) -> _Patch:
      start = byte + j * below.patch_size
      before = jnp.maximum(start - below.patch_size - patch_start, 0)
      previous = jax.lax.dynamic_slice_in_dim(made.bytes_BS, before, below.patch_size, axis=1)
      part_B11s = jax.lax.dynamic_slice_in_dim(parts_BMs, j, 1, axis=1)[:, None]
      return self._decode_slot(i + 1, j, start, part_B11s, previous, made, patch_start, pick)

    caches, memories = self._begin_span(i + 1, caches, memories)
    begun = _Patch(caches, memories, bytes_BS, logits_BSV)
    return jax.lax.fori_loop(0, config.patch_size // below.patch_size, one_slot, begun)

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
    """Makes the state before the first byte."""
    width = [level.width for level in self.config.levels]
    return ByteState(
      self.start_decoding(batch), tuple(jnp.zeros((batch, 1, 1, D), compute_dtype(self.config)) for D in width)
    )

  def first_level_at(self, position: int) -> int:
    """Returns the coarsest level that has a slot starting at byte `position`; the number of levels where none has."""
    starts = (i for i, level in enumerate(self.config.levels) if position % level.patch_size == 0)
    return next(starts, len(self.levels))

  def decode_byte(self, state: ByteState, previous_B: jax.Array, first_level: int = 0) -> tuple[ByteState, jax.Array]:
    """Computes the logits of one byte, [B, V] float32, and the state for the next.

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
