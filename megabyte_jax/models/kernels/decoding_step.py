"""Computes all layers of a stack, for one slot of a single sample, in one GPU kernel.

A byte of one sample costs each layer its matrices, which are read once. As kernels of their own these products take
longer to start, to fetch their input and to end than to read. Here as many programs as the chip has multiprocessors
stay for the whole step. They go through the phases (decoding_phases.py) of every layer together,

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

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from megabyte_jax.config import BlockOptions, Level
from megabyte_jax.models.kernels import cached_attention
from megabyte_jax.models.kernels.decoding_phases import Phase, Phases, Refs, power_of_two_in
from megabyte_jax.models.kernels.known_options import IN_ONE_KERNEL
from megabyte_jax.parallel.backend import platform, triton

_INTERPRETED_PROGRAMS = 4

Arrays = dict[str, Any]  # or their shapes, by name


class Weights(NamedTuple):
  """Holds a stack's parameters, of all layers; no bias, shift or scale of weights in 8 bits is None.

  Attributes:
    qkv_LD: [L, 3, H, 2, K / 2, D]; the two halves of a head, which rotary positions mix.
    out_LDE, ff_in_LFD, ff_out_LDF: weights, [L, outputs, inputs]; of a gated feed-forward layer [L, 2 F, D].
    qkv_bias: [L, 3, H, 2, K / 2]; the other biases: [L, outputs].
    attention_scale_LD, attention_shift_LD, ff_scale_LD, ff_shift_LD: of the norms, float32.
    qkv_scale, out_scale, ff_in_scale, ff_out_scale: of weights in 8 bits (layers/quantised.py), shaped as the biases.
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
  qkv_scale: jax.Array | None = None
  out_scale: jax.Array | None = None
  ff_in_scale: jax.Array | None = None
  ff_out_scale: jax.Array | None = None


def programs() -> int:
  """Returns the programs of a kernel: a power of two, at most the multiprocessors of the GPU."""
  if platform() != "gpu":
    return _INTERPRETED_PROGRAMS
  return 1 << (jax.devices()[0].core_count.bit_length() - 1)


def obstacle(level: Level, options: BlockOptions, rows: int) -> str:
  """Returns why all layers of this level cannot be one kernel for so many samples, or '' if they can."""
  heads, head_width = level.heads
  hidden = options.hidden(level)
  largest = level.num_layers * level.width * max(3 * heads * head_width, (1 + options.gated) * hidden)
  if rows != 1:
    return f"it takes one sample, not {rows}"
  if any(n % programs() for n in (heads * head_width // 2, level.width, hidden)):
    return f"{programs()} programs do not divide the widths {heads * head_width // 2}, {level.width} and {hidden}"
  if any(power_of_two_in(n) < 64 for n in (level.width, heads * head_width, hidden)):
    return f"64 does not divide the widths {level.width}, {heads * head_width} and {hidden}"
  if largest >= 1 << 31:
    return "offsets have 32 bits"
  return IN_ONE_KERNEL.obstacle(level, options) or cached_attention.obstacle(level, options)


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
  """Returns the residual stream after all layers (float32 [D], before the last norm), and the caches with the new slot.

  Args:
    first, at: which entries of the caches are seen: from `first` on to `at`, the slot's own.
    slot: its number within the span, for rotary positions.
    epsilon: of the norms.
  """
  L, S, H, K = k_LSHK.shape
  D, F = level.width, options.hidden(level)
  phases = Phases(level, options, epsilon, S, programs())
  places_3 = jnp.stack([first, at, slot]).astype(jnp.int32)
  given = {name: a for name, a in weights._asdict().items() if a is not None} | {"places": places_3}
  dtype = k_LSHK.dtype
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
  if not phases.short:
    between["out"] = jax.ShapeDtypeStruct((phases.parts, H, K), jnp.float32)
    between["log_sum"] = jax.ShapeDtypeStruct((phases.parts, H), jnp.float32)
  made = (in_one if platform() == "gpu" else one_by_one)(phases, given, changed, between, L)
  return made["x"], made["k"].reshape(k_LSHK.shape), made["v"].reshape(v_LSHK.shape)


def in_one(phases: Phases, given: Arrays, changed: Arrays, between: Arrays, num_layers: int) -> Arrays:
  """Runs all phases of all layers in one kernel."""

  def kernel(refs: Refs) -> None:
    arrived = refs["arrived"]

    def wait(passed):
      seen = jax.lax.while_loop(
        lambda seen: seen < passed * phases.programs,
        lambda _: triton().load(arrived.at[0], volatile=True),
        jnp.int32(-1),
      )

      @pl.when(seen > 1 << 30)  # never; a loop whose result is not used would be removed
      def _():
        arrived[0] = 0

    def layer(i, _):
      for p, phase in enumerate(phases.in_order):
        phase(refs, i, functools.partial(wait, i * len(phases.in_order) + p))
        triton().debug_barrier()  # all threads have written
        triton().atomic_add(arrived, 0, 1)
      return 0

    jax.lax.fori_loop(0, num_layers, layer, 0)

  # Sixteen warps keep more of wide products in flight, eight wait less for each other (measured).
  warps = 16 if phases.short or phases.level.width >= 2048 else 8
  params = triton().CompilerParams(num_warps=warps, num_stages=1)
  return run(kernel, phases.programs, given, changed, between, compiler_params=params, name="stack_step")


def one_by_one(phases: Phases, given: Arrays, changed: Arrays, between: Arrays, num_layers: int) -> Arrays:
  """Runs a call for each phase of each layer, interpreted."""
  changed = changed | {name: jnp.zeros(a.shape, a.dtype) for name, a in between.items()}
  for layer in range(num_layers):
    for phase in phases.in_order:

      def kernel(refs: Refs, phase: Phase = phase, layer: int = layer) -> None:
        phase(refs, jnp.int32(layer), lambda: None)

      changed = run(kernel, phases.programs, given, changed, {}, interpret=True)
  return changed


def run(
  kernel: Callable[[Refs], None], num_programs: int, given: Arrays, changed: Arrays, made: Arrays, **options: Any
) -> Arrays:
  """Returns the arrays that `kernel` changes or makes; it is given all by name."""
  outputs = changed | made

  def with_names(*refs):
    kernel(dict(zip(given, refs, strict=False)) | dict(zip(outputs, refs[-len(outputs) :], strict=True)))

  results = pl.pallas_call(
    with_names,
    grid=(num_programs,),
    out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs.values()],
    input_output_aliases={len(given) + i: i for i in range(len(changed))},
    **options,
  )(*given.values(), *changed.values())
  return dict(zip(outputs, results, strict=True))
