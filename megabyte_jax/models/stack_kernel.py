"""All layers of a stack, for one slot of a single sample, in one GPU kernel.

A byte of one sample costs each layer its matrices, which are read once. As kernels of their own these products take
longer to start, to fetch their input and to end than to read. Here as many programs as the chip has multiprocessors
stay for the whole step. They go through the phases of every layer together,

  qkv       norm, product, rotary positions; keys and values go into the cache
  attend    for long caches only: each program takes a head, or some slots of one
  out       attention (or the sum of what `attend` left), product, residual
  ff_in     norm, product, activation
  ff_out    product, residual

and wait for each other between any two: each counts itself in `arrived` when its results are written, and goes on when
all have. Before it waits it asks for its weights of the next phase, which come while it waits.

All programs must run at once, so there are no more than multiprocessors, and a program takes a whole one if need be.
Interpreted, where there is no GPU, programs run one after the other and would wait forever: there each phase is a
call of its own. Sums, statistics and the residual stream are float32. With more samples than one, products by XLA are
faster (docs/results.md).

Shapes: D width, H heads, K head width, E = H K, F feed-forward width, S slots of a cache, L layers, P parts of a cache,
C columns (of a product's result) at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from megabyte_jax.backend import platform, triton
from megabyte_jax.models import cached_attention
from megabyte_jax.models.cached_attention import LOWEST, SMALLEST, softmax_step
from megabyte_jax.models.config import BlockOptions, Level

_PIECE = 1 << 13  # weights that a program asks for at once
_IN_FLIGHT = 1 << 15  # weights asked for and not yet there
_CHUNK = 2048  # inputs of a piece, at most
_SLOTS = 128  # of a cache that a program has in registers at once
_SHORT = 16  # slots of a cache, up to which every program does the attention of all heads by itself
_MAX_PARTS = 8
_INTERPRETED_PROGRAMS = 4

Refs = dict[str, Any]
Place = tuple[Any, ...]  # indices of a weight, but for its layer and its inputs
Wait = Callable[[], None]  # for the phase before
Inputs = Callable[[], list[jax.Array]]  # of a product, in chunks
Phase = Callable[[Refs, jax.Array, Wait], None]  # given the layer's number


class Weights(NamedTuple):
  """A stack's parameters, of all layers; no bias or shift is None.

  Attributes:
    qkv_LD: [L, 3, H, 2, K / 2, D]; the two halves of a head, which rotary positions mix.
    out_LDE, ff_in_LFD, ff_out_LDF: weights, [L, outputs, inputs]; of a gated feed-forward layer [L, 2 F, D].
    qkv_bias: [L, 3, H, 2, K / 2]; the other biases: [L, outputs].
    attention_scale_LD, attention_shift_LD, ff_scale_LD, ff_shift_LD: of the norms, float32.
  """

  qkv_LD: jax.Array
  qkv_bias: jax.Array | None
  out_LDE: jax.Array
  out_bias: jax.Array | None
  ff_in_LFD: jax.Array
  ff_in_bias: jax.Array | None
  ff_out_LDF: jax.Array
  ff_out_bias: jax.Array | None
  attention_scale_LD: jax.Array
  attention_shift_LD: jax.Array | None
  ff_scale_LD: jax.Array
  ff_shift_LD: jax.Array | None


def programs() -> int:
  """Of a kernel: a power of two, at most the multiprocessors of the GPU."""
  if platform() != "gpu":
    return _INTERPRETED_PROGRAMS
  return 1 << (jax.devices()[0].core_count.bit_length() - 1)


def serves(level: Level, options: BlockOptions, rows: int) -> bool:
  """Whether the kernel takes so many samples of this level."""
  heads, head_width = level.heads
  hidden = options.hidden(level)
  largest = level.num_layers * level.width * max(3 * heads * head_width, (1 + options.gated) * hidden)
  return (
    rows == 1
    and not options.qk_norm
    and cached_attention.serves(level)
    and all(n % programs() == 0 for n in (heads * head_width // 2, level.width, hidden))
    and all(_power_of_two_in(n) >= 64 for n in (level.width, heads * head_width, hidden))
    and largest < 1 << 31  # offsets have 32 bits
  )


def step(
  x_D: jax.Array,
  weights: Weights,
  k_LSHK: jax.Array,
  v_LSHK: jax.Array,
  *,
  first: jax.Array,
  at: jax.Array,
  slot: jax.Array,
  level: Level,
  options: BlockOptions,
  epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The residual stream after all layers (float32 [D], before the last norm), and the caches with the new slot.

  Args:
    first, at: which entries of the caches are seen: from `first` on to `at`, the slot's own.
    slot: its number within the span, for rotary positions.
    epsilon: of the norms.
  """
  places_3 = jnp.stack([first, at, slot]).astype(jnp.int32)
  return _Call(level, options, epsilon, k_LSHK.shape[1], programs())(x_D, weights, k_LSHK, v_LSHK, places_3)


@dataclasses.dataclass(frozen=True)
class _Call:
  """The kernel for some sizes."""

  level: Level
  options: BlockOptions
  epsilon: float
  slots: int
  programs: int

  @property
  def short(self) -> bool:
    """Whether `out` does the attention."""
    return self.slots <= _SHORT

  @property
  def warps(self) -> int:
    """Of a program. Sixteen keep more of wide products in flight, eight wait less for each other (measured)."""
    return 16 if self.short or self.level.width >= 2048 else 8

  @property
  def parts(self) -> int:
    """Of a cache: enough for all programs, none of less than a tile."""
    parts, (heads, _) = 1, self.level.heads
    while parts < _MAX_PARTS and 2 * parts * heads <= self.programs and 2 * parts * _SLOTS <= self.slots:
      parts *= 2
    return parts

  @property
  def phases(self) -> list[Phase]:
    """What is done in every layer; each is given the layer's number and what waits for the phase before."""
    return [self.qkv, *([] if self.short else [self.attend]), self.out, self.ff_in, self.ff_out]

  def __call__(self, x_D, weights, k_LSHK, v_LSHK, places_3):
    L, S, H, K = k_LSHK.shape
    D, F = self.level.width, self.options.hidden(self.level)
    given = {name: a for name, a in weights._asdict().items() if a is not None} | {"places": places_3}
    dtype = weights.out_LDE.dtype
    changed = {
      "x": x_D.astype(jnp.float32),
      "k": k_LSHK.reshape(L, S, H, 2, K // 2),
      "v": v_LSHK.reshape(L, S, H, 2, K // 2),
      "arrived": jnp.zeros(1, jnp.int32),
    }
    between = {
      "middle": jax.ShapeDtypeStruct((D,), jnp.float32),
      "q": jax.ShapeDtypeStruct((H, 2, K // 2), dtype),
      "hidden": jax.ShapeDtypeStruct((F,), dtype),
    }
    if not self.short:
      between["out"] = jax.ShapeDtypeStruct((self.parts, H, K), jnp.float32)
      between["log_sum"] = jax.ShapeDtypeStruct((self.parts, H), jnp.float32)
    made = (self._in_one if platform() == "gpu" else self._one_by_one)(given, changed, between, L)
    return made["x"], made["k"].reshape(k_LSHK.shape), made["v"].reshape(v_LSHK.shape)

  def _in_one(self, given, changed, between, num_layers):
    """All phases of all layers in one kernel."""

    def kernel(refs: Refs) -> None:
      arrived = refs["arrived"]

      def wait(phases):
        seen = jax.lax.while_loop(
          lambda seen: seen < phases * self.programs,
          lambda _: triton().load(arrived.at[0], volatile=True),
          jnp.int32(-1),
        )

        @pl.when(seen > 1 << 30)  # never; a loop whose result is not used would be removed
        def _():
          arrived[0] = 0

      def layer(i, _):
        for p, phase in enumerate(self.phases):
          phase(refs, i, functools.partial(wait, i * len(self.phases) + p))
          triton().debug_barrier()  # all threads have written
          triton().atomic_add(arrived, 0, 1)
        return 0

      jax.lax.fori_loop(0, num_layers, layer, 0)

    params = triton().CompilerParams(num_warps=self.warps, num_stages=1)
    return self._run(kernel, given, changed, between, compiler_params=params, name="stack_step")

  def _one_by_one(self, given, changed, between, num_layers):
    """A call for each phase of each layer, interpreted."""
    changed |= {name: jnp.zeros(a.shape, a.dtype) for name, a in between.items()}
    for layer in range(num_layers):
      for phase in self.phases:

        def kernel(refs: Refs, phase: Phase = phase, layer: int = layer) -> None:
          phase(refs, jnp.int32(layer), lambda: None)

        changed = self._run(kernel, given, changed, {}, interpret=True)
    return changed

  def _run(self, kernel, given, changed, made, **options):
    """The arrays that `kernel` changes or makes, given all by name."""
    outputs = changed | made

    def with_names(*refs):
      kernel(dict(zip(given, refs, strict=False)) | dict(zip(outputs, refs[-len(outputs) :], strict=True)))

    results = pl.pallas_call(
      with_names,
      grid=(self.programs,),
      out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs.values()],
      input_output_aliases={len(given) + i: i for i in range(len(changed))},
      **options,
    )(*given.values(), *changed.values())
    return dict(zip(outputs, results, strict=True))

  # --- Phases. Each asks for weights, waits, reads what other programs wrote, and writes its columns. ---

  def qkv(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
    heads, head_width = self.level.heads
    own, half = heads * head_width // 2 // self.programs, head_width // 2
    columns = min(_power_of_two_in(own), half, max(1, _PIECE // 2 // self.chunk(self.level.width)))
    wanted = []
    for first in range(0, own, columns):
      begin = pl.program_id(0) * own + first
      wanted += [(i, begin // half, slice(None), pl.ds(begin % half, columns)) for i in range(3)]
    biases = self.biases(refs, "qkv", layer, wanted)
    at, slot = refs["places"][1], refs["places"][2]
    inputs = self.normed(refs, "attention", "x", layer)
    products = self.products(refs["qkv_LD"], layer, wanted, self.level.width, wait, inputs)
    for (i, head, both, where), y_2C, bias_2C in zip(wanted, products, biases, strict=True):
      y_2C = (y_2C + bias_2C).astype(refs["q"].dtype)
      if self.level.rotary and i < 2:
        y_2C = rotated(y_2C.astype(jnp.float32), slot, where.start, half).astype(y_2C.dtype)
      to = refs["q"].at[head, both, where] if i == 0 else refs["qkv"[i]].at[layer, at, head, both, where]
      to[...] = y_2C

  def attend(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
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
    heads, head_width = self.level.heads
    attended = self.attended if self.short else self.added_up
    per_chunk = self.chunk(heads * head_width) // head_width
    chunks = [pl.ds(head, per_chunk) for head in range(0, heads, per_chunk)]

    def inputs():
      return [attended(refs, layer, which).astype(refs["q"].dtype).astype(jnp.float32).reshape(-1) for which in chunks]

    self.product(refs, "out", "out_LDE", "middle", layer, heads * head_width, wait, inputs, added="x")

  def ff_in(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
    inputs = self.normed(refs, "ff", "middle", layer)
    if not self.options.gated:
      activation = getattr(jax.nn, self.options.activation)
      return self.product(refs, "ff_in", "ff_in_LFD", "hidden", layer, self.level.width, wait, inputs, activation)
    hidden = self.options.hidden(self.level)
    places = self.places(hidden, self.level.width)
    wanted = [(pl.ds(half * hidden + place.start, place.size),) for place in places for half in range(2)]
    biases = self.biases(refs, "ff_in", layer, wanted)
    products = self.products(refs["ff_in_LFD"], layer, wanted, self.level.width, wait, inputs)
    sums = [y_C + bias_C for y_C, bias_C in zip(products, biases, strict=True)]
    for place, gate_C, up_C in zip(places, sums[::2], sums[1::2], strict=True):
      refs["hidden"][place] = (jax.nn.silu(gate_C) * up_C).astype(refs["hidden"].dtype)

  def ff_out(self, refs: Refs, layer: jax.Array, wait: Wait) -> None:
    hidden = self.options.hidden(self.level)
    chunk = self.chunk(hidden)

    def inputs():
      return [fresh(refs["hidden"], pl.ds(c, chunk)).astype(jnp.float32) for c in range(0, hidden, chunk)]

    self.product(refs, "ff_out", "ff_out_LDF", "x", layer, hidden, wait, inputs, added="middle")

  # --- The input of a product, float32, in chunks. ---

  def normed(self, refs: Refs, norm: str, source: str, layer: jax.Array) -> Inputs:
    """What gives the normed residual stream, rounded as the weights are; the norm's parameters are asked for now."""
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
    """The attended values of some heads over a short cache."""
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
    """The attended values of some heads from those of parts of the cache."""
    del layer
    log_sums = [fresh(refs["log_sum"], p, which) for p in range(self.parts)]
    largest_H = functools.reduce(jnp.maximum, log_sums)
    weights = [jnp.exp(a - largest_H) for a in log_sums]
    out_HK = sum_of(w_H[:, None] * fresh(refs["out"], p, which) for p, w_H in enumerate(weights))
    return out_HK / sum_of(weights)[:, None]

  # --- Products. ---

  def chunk(self, inputs: int) -> int:
    """Inputs that are taken at once."""
    return min(_power_of_two_in(inputs), _CHUNK)

  def places(self, outputs: int, inputs: int) -> list[Any]:
    """The columns of this program, in pieces."""
    own = outputs // self.programs
    columns = min(_power_of_two_in(own), max(1, _PIECE // self.chunk(inputs)))
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
    """Writes refs[added] + activation(made @ weight + bias) to refs[to]."""
    places = self.places(refs[weight].shape[1], inputs)
    wanted = [(place,) for place in places]
    biases = self.biases(refs, name, layer, wanted)
    # A program's own columns of the residual stream have long been there.
    residual = [fresh(refs[added], place) if added else 0.0 for place in places]
    products = self.products(refs[weight], layer, wanted, inputs, wait, made)
    for place, y_C, bias_C, residual_C in zip(places, products, biases, residual, strict=True):
      y_C = y_C + bias_C
      y_C = y_C if activation is None else activation(y_C)
      refs[to][place] = (y_C + residual_C).astype(refs[to].dtype)

  def biases(self, refs: Refs, name: str, layer: jax.Array, wanted: list[Place]) -> list[Any]:
    """Those of the wanted places, float32, or zeros."""
    bias = refs.get(f"{name}_bias")
    return [0.0 if bias is None else bias[layer, *place].astype(jnp.float32) for place in wanted]

  def products(
    self, weight: Any, layer: jax.Array, wanted: list[Place], inputs: int, wait: Wait, made: Inputs
  ) -> list[jax.Array]:
    """For each of the wanted places of a weight the sums over its inputs, which `made` gives in chunks; float32."""
    chunk = self.chunk(inputs)
    chunks = [pl.ds(c, chunk) for c in range(0, inputs, chunk)]
    pieces = [(place, c) for place in wanted for c in range(len(chunks))]

    def ask(place, c):
      return weight[layer, *place, chunks[c]]

    asked = [ask(*pieces[0])]
    ahead = max(1, _IN_FLIGHT // math.prod(asked[0].shape))
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
  """What other programs wrote: read past the multiprocessor's own cache, which may have what was there before."""
  return triton().load(ref.at[*(jnp.int32(i) if isinstance(i, int) else i for i in place)], volatile=True)


def sum_of(arrays: Iterable[jax.Array]) -> jax.Array:
  """Their sum."""
  return functools.reduce(jnp.add, arrays)


def rotated(y_2C: jax.Array, slot: jax.Array, first: jax.Array | int, half: int) -> jax.Array:
  """Rotary positions of the columns `first`.. of both halves of a head (see `rotate` in layers.py)."""
  columns = y_2C.shape[1]
  frequency_C = jnp.exp((first + jnp.arange(columns)).astype(jnp.float32) * (-math.log(10_000.0) / half))
  angle_C = slot.astype(jnp.float32) * frequency_C
  is_first_2C = jnp.broadcast_to(jnp.arange(2)[:, None] == 0, y_2C.shape)
  a_C, b_C = (jnp.sum(jnp.where(which, y_2C, 0.0), axis=0) for which in (is_first_2C, ~is_first_2C))
  sin_C, cos_C = jnp.sin(angle_C), jnp.cos(angle_C)
  a_C, b_C = a_C * cos_C - b_C * sin_C, b_C * cos_C + a_C * sin_C
  a_2C, b_2C = (jnp.broadcast_to(half_C[None], y_2C.shape) for half_C in (a_C, b_C))
  return jnp.where(is_first_2C, a_2C, b_2C)


def _power_of_two_in(n: int) -> int:
  """The largest power of two that divides n."""
  return n & -n
