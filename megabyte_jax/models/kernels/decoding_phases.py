"""Computes the phases of a layer for the kernel of decoding_step.py; each of its programs does a share of columns.

A phase asks for its first weights, waits for the phase before, reads what other programs wrote, and writes its columns.
Shapes are those of decoding_step.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from megabyte_jax.config import BlockOptions, Level
from megabyte_jax.models.kernels.cached_attention import LOWEST, SMALLEST, softmax_step
from megabyte_jax.parallel.backend import triton

_PIECE = 1 << 13  # weights that a program asks for at once
_IN_FLIGHT = 1 << 16  # bytes of weights asked for and not yet there
_CHUNK = 2048  # inputs of a piece, at most
_SLOTS = 128  # of a cache that a program has in registers at once
_SHORT = 16  # slots of a cache, up to which every program does the attention of all heads by itself
_MAX_PARTS = 8

Refs = dict[str, Any]  # by name, with the fields of decoding_step.Weights
Place = tuple[Any, ...]  # indices of a weight, but for its layer and its inputs
Wait = Callable[[], None]  # for the phase before
Inputs = Callable[[], list[jax.Array]]  # of a product, in chunks
Phase = Callable[[Refs, jax.Array, Wait], None]  # given the layer's number


@dataclasses.dataclass(frozen=True)
class Phases:
  """The phases for a stack's sizes.

  Attributes:
    level, options: the stack's.
    epsilon: of the norms.
    slots: of a cache.
    programs: of the kernel.
  """

  level: Level
  options: BlockOptions
  epsilon: float
  slots: int
  programs: int

  @property
  def short(self) -> bool:
    """True if `out` computes the attention."""
    return self.slots <= _SHORT

  @property
  def parts(self) -> int:
    """Number of parts of a cache: enough for all programs, none smaller than a tile."""
    parts, (heads, _) = 1, self.level.heads
    while parts < _MAX_PARTS and 2 * parts * heads <= self.programs and 2 * parts * _SLOTS <= self.slots:
      parts *= 2
    return parts

  @property
  def in_order(self) -> list[Phase]:
    """Phases of every layer; each is given the layer's number and a wait for the phase before."""
    return [self.qkv, *([] if self.short else [self.attend]), self.out, self.ff_in, self.ff_out]

  # --- Phases. ---

  def qkv(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
    """Computes norm, product, rotary positions; a program has the same columns of queries, keys and values."""
    heads, head_width = self.level.heads
    own, half = heads * head_width // 2 // self.programs, head_width // 2
    columns = min(power_of_two_in(own), half, max(1, _PIECE // 2 // self.chunk(self.level.width)))
    wanted = []
    for first in range(0, own, columns):
      begin = pl.program_id(0) * own + first
      wanted += [(i, begin // half, slice(None), pl.ds(begin % half, columns)) for i in range(3)]
    added = self.added(refs, "qkv", layer, wanted)
    at, slot = refs["places"][1], refs["places"][2]
    inputs = self.normed(refs, "attention", "x", layer)
    products = self.products(refs["qkv_LD"], layer, wanted, self.level.width, wait, inputs)
    for (i, head, both, where), y_2C, (scale_2C, bias_2C) in zip(wanted, products, added, strict=True):
      y_2C = (y_2C * scale_2C + bias_2C).astype(refs["q"].dtype)
      if self.level.rotary and i < 2:
        y_2C = rotated(y_2C.astype(jnp.float32), slot, where.start, half).astype(y_2C.dtype)
      to = refs["q"].at[head, both, where] if i == 0 else refs["qkv"[i]].at[layer, at, head, both, where]
      to[...] = y_2C

  def attend(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
    """Attends by each program's heads, or parts of the slots of one, and leaves the log of each sum of weights."""
    heads, head_width = self.level.heads
    first, end = refs["places"][0], refs["places"][1] + 1
    per_part = pl.cdiv(pl.cdiv(end - first, self.parts), _SLOTS) * _SLOTS
    wait()

    def one(task):
      part, head = task % self.parts, task // self.parts
      begin = first + part * per_part
      stop = jnp.minimum(begin + per_part, end)
      q_2K = fresh(refs["q"], head).astype(jnp.float32) * head_width**-0.5

      def add(i, carry):
        start = begin + i * _SLOTS
        inside_S = start + jnp.arange(_SLOTS) < stop
        mask_S2K = jnp.broadcast_to(inside_S[:, None, None], (_SLOTS, *q_2K.shape))
        cached = (refs[name].at[layer, pl.ds(start, _SLOTS), head] for name in "kv")
        k_S2K, v_S2K = (triton().load(ref, mask=mask_S2K, other=0) for ref in cached)
        return softmax_step(carry, q_2K, k_S2K, v_S2K, inside_S)

      nothing = jnp.float32(LOWEST), jnp.float32(0), jnp.zeros_like(q_2K)
      rounds = pl.cdiv(jnp.maximum(stop - begin, 0), _SLOTS)
      largest, total, out_2K = jax.lax.fori_loop(0, rounds, add, nothing)
      total = jnp.maximum(total, SMALLEST)  # a part may have no slots
      refs["out"][part, head] = (out_2K / total).reshape(head_width)
      refs["log_sum"][part, head] = largest + jnp.log(total)

    for task in range(0, heads * self.parts, self.programs):
      place = task + pl.program_id(0)
      pl.when(place < heads * self.parts)(functools.partial(one, place))

  def out(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
    """Computes attention over a short cache, or the sum of what `attend` left; then product and residual."""
    heads, head_width = self.level.heads
    attended = self.attended if self.short else self.added_up
    per_chunk = self.chunk(heads * head_width) // head_width
    chunks = [pl.ds(head, per_chunk) for head in range(0, heads, per_chunk)]

    def inputs():
      return [attended(refs, layer, which).astype(refs["q"].dtype).astype(jnp.float32).reshape(-1) for which in chunks]

    self.product(refs, "out", "out_LDE", "middle", layer, heads * head_width, wait, inputs, added="x")

  def ff_in(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
    """Computes norm, product, activation; the two halves of a gated layer together."""
    inputs = self.normed(refs, "ff", "middle", layer)
    if not self.options.gated:
      activation = getattr(jax.nn, self.options.activation)
      return self.product(refs, "ff_in", "ff_in_LFD", "hidden", layer, self.level.width, wait, inputs, activation)
    hidden = self.options.hidden(self.level)
    places = self.places(hidden, self.level.width)
    wanted = [(pl.ds(half * hidden + place.start, place.size),) for place in places for half in range(2)]
    added = self.added(refs, "ff_in", layer, wanted)
    products = self.products(refs["ff_in_LFD"], layer, wanted, self.level.width, wait, inputs)
    sums = [y_C * scale_C + bias_C for y_C, (scale_C, bias_C) in zip(products, added, strict=True)]
    for place, gate_C, up_C in zip(places, sums[::2], sums[1::2], strict=True):
      refs["hidden"][place] = (jax.nn.silu(gate_C) * up_C).astype(refs["hidden"].dtype)

  def ff_out(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
    """Computes product and residual."""
    hidden = self.options.hidden(self.level)
    chunk = self.chunk(hidden)

    def inputs():
      return [fresh(refs["hidden"], pl.ds(c, chunk)).astype(jnp.float32) for c in range(0, hidden, chunk)]

    self.product(refs, "ff_out", "ff_out_LDF", "x", layer, hidden, wait, inputs, added="middle")

  # --- The input of a product, float32, in chunks. ---

  def normed(self, refs: Refs, norm: str, source: str, layer: jax.Array) -> Inputs:
    """Prefetches the norm's parameters; returns a function for the normed residual stream, rounded like the weights."""
    D, chunk = self.level.width, self.chunk(self.level.width)
    chunks = [pl.ds(c, chunk) for c in range(0, D, chunk)]
    names = f"{norm}_scale_LD", f"{norm}_shift_LD"
    scales, shifts = ([refs[name][layer, c] if name in refs else 0.0 for c in chunks] for name in names)

    def inputs():
      x = [fresh(refs[source], where) for where in chunks]
      if self.options.norm == "layernorm":
        mean = sum_of(jnp.sum(a) for a in x) / D
        x = [a - mean for a in x]
      factor = jax.lax.rsqrt(sum_of(jnp.sum(a * a) for a in x) / D + self.epsilon)
      x = [a * factor * scale + shift for a, scale, shift in zip(x, scales, shifts, strict=True)]
      return [a.astype(refs["q"].dtype).astype(jnp.float32) for a in x]

    return inputs

  def attended(self, refs: Refs, layer: jax.Array, which: Any) -> jax.Array:
    """Returns the attended values of some heads over a short cache."""
    head_width = self.level.heads[1]
    first, at = refs["places"][0], refs["places"][1]
    q_H2K = fresh(refs["q"], which).astype(jnp.float32)
    logits, values = [], []
    for s in range(self.slots):
      k_H2K, v_H2K = (fresh(refs[name], layer, s, which).astype(jnp.float32) for name in "kv")
      seen_H = jnp.broadcast_to((s >= first) & (s <= at), (which.size,))
      logits.append(jnp.where(seen_H, jnp.sum(jnp.sum(q_H2K * k_H2K, axis=2), axis=1), LOWEST))
      values.append(v_H2K)
    largest_H = functools.reduce(jnp.maximum, logits)
    weights = [jnp.exp((a - largest_H) * head_width**-0.5) for a in logits]
    total_H = sum_of(weights)
    return sum_of(w_H[:, None, None] * v for w_H, v in zip(weights, values, strict=True)) / total_H[:, None, None]

  def added_up(self, refs: Refs, layer: jax.Array, which: Any) -> jax.Array:
    """Sums the attended values of some heads from those of parts of the cache."""
    del layer
    log_sums = [fresh(refs["log_sum"], p, which) for p in range(self.parts)]
    largest_H = functools.reduce(jnp.maximum, log_sums)
    weights = [jnp.exp(a - largest_H) for a in log_sums]
    out_HK = sum_of(w_H[:, None] * fresh(refs["out"], p, which) for p, w_H in enumerate(weights))
    return out_HK / sum_of(weights)[:, None]

  # --- Products. ---

  def chunk(self, inputs: int) -> int:
    """Returns how many inputs are taken at once."""
    return min(power_of_two_in(inputs), _CHUNK)

  def places(self, outputs: int, inputs: int) -> list[Any]:
    """Returns the columns of this program, in pieces."""
    own = outputs // self.programs
    columns = min(power_of_two_in(own), max(1, _PIECE // self.chunk(inputs)))
    return [pl.ds(pl.program_id(0) * own + first, columns) for first in range(0, own, columns)]

  def product(
    self,
    refs: Refs,
    name: str,
    weight: str,
    to: str,
    layer: jax.Array,
    inputs: int,
    wait: Wait,
    made: Inputs,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    added: str = "",
  ) -> None:
    """Writes refs[added] + activation(made @ weight * scale + bias) to refs[to]."""
    places = self.places(refs[weight].shape[1], inputs)
    wanted = [(place,) for place in places]
    scales_and_biases = self.added(refs, name, layer, wanted)
    # A program's own columns of the residual stream have long been there.
    residual = [fresh(refs[added], place) if added else 0.0 for place in places]
    products = self.products(refs[weight], layer, wanted, inputs, wait, made)
    for place, y_C, (scale_C, bias_C), residual_C in zip(places, products, scales_and_biases, residual, strict=True):
      y_C = y_C * scale_C + bias_C
      y_C = y_C if activation is None else activation(y_C)
      refs[to][place] = (y_C + residual_C).astype(refs[to].dtype)

  def added(self, refs: Refs, name: str, layer: jax.Array, wanted: list[Place]) -> list[tuple[Any, Any]]:
    """Returns scale and bias of the wanted places, float32; 1 for weights that are not in 8 bits, 0 without bias."""

    def read(ref, place, default):
      return default if ref is None else ref[layer, *place].astype(jnp.float32)

    scale, bias = refs.get(f"{name}_scale"), refs.get(f"{name}_bias")
    return [(read(scale, place, 1.0), read(bias, place, 0.0)) for place in wanted]

  def products(
    self, weight: Any, layer: jax.Array, wanted: list[Place], inputs: int, wait: Wait, made: Inputs
  ) -> list[jax.Array]:
    """Sums, for each wanted place of a weight, over its inputs, which `made` gives in chunks; float32."""
    chunk = self.chunk(inputs)
    chunks = [pl.ds(c, chunk) for c in range(0, inputs, chunk)]
    pieces = [(place, c) for place in wanted for c in range(len(chunks))]

    def ask(place, c):
      return weight[layer, *place, chunks[c]]

    asked = [ask(*pieces[0])]
    ahead = max(1, _IN_FLIGHT // (math.prod(asked[0].shape) * asked[0].dtype.itemsize))
    asked += [ask(*piece) for piece in pieces[1:ahead]]
    wait()
    x = made()
    sums, terms = [], None
    for i, (_, c) in enumerate(pieces):
      w = asked[i].astype(jnp.float32)
      if i + ahead < len(pieces):
        asked.append(ask(*pieces[i + ahead]))
      new = w * x[c].reshape(*[1] * (w.ndim - 1), chunk)
      terms = new if c == 0 else terms + new
      if c == len(chunks) - 1:
        sums.append(jnp.sum(terms, axis=-1))
    return sums


def fresh(ref: Any, *place: Any) -> jax.Array:
  """Reads what other programs wrote, past the multiprocessor's own cache, which may have what was there before."""
  return triton().load(ref.at[*(jnp.int32(i) if isinstance(i, int) else i for i in place)], volatile=True)


def sum_of(arrays: Iterable[jax.Array]) -> jax.Array:
  """Sums arrays."""
  return functools.reduce(jnp.add, arrays)


def rotated(y_2C: jax.Array, slot: jax.Array, first: jax.Array | int, half: int) -> jax.Array:
  """Applies rotary positions to the columns `first`.. of both halves of a head (see `rotate` in block.py)."""
  columns = y_2C.shape[1]
  frequency_C = jnp.exp((first + jnp.arange(columns)).astype(jnp.float32) * (-math.log(10_000.0) / half))
  angle_C = slot.astype(jnp.float32) * frequency_C
  is_first_2C = jnp.broadcast_to(jnp.arange(2)[:, None] == 0, y_2C.shape)
  a_C, b_C = (jnp.sum(jnp.where(which, y_2C, 0.0), axis=0) for which in (is_first_2C, ~is_first_2C))
  sin_C, cos_C = jnp.sin(angle_C), jnp.cos(angle_C)
  a_C, b_C = a_C * cos_C - b_C * sin_C, b_C * cos_C + a_C * sin_C
  a_2C, b_2C = (jnp.broadcast_to(half_C[None], y_2C.shape) for half_C in (a_C, b_C))
  return jnp.where(is_first_2C, a_2C, b_2C)


def power_of_two_in(n: int) -> int:
  """Returns the largest power of two that divides n."""
  return n & -n
