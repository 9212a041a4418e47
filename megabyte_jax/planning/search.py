"""Searches for the mesh, batch size, rematerialisation and accumulation that suit a topology: `plan --search`.

Candidates are all combinations that divide evenly and whose train state alone fits. They are ordered by a closed-form
estimate of the time per byte and compiled in that order until one fits: first with little optimisation, then, if that
fits, as the real program. A program that did not fit rules out others, which are skipped, and puts off those of like
need: after a near miss more parts or more recomputation come before another mesh.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from megabyte_jax.config import Config, MeshConfig
from megabyte_jax.config.levels import Remat
from megabyte_jax.errors import ConfigError
from megabyte_jax.models import flops
from megabyte_jax.parallel import hardware
from megabyte_jax.parallel.sharding import check_mesh
from megabyte_jax.planning import roofline
from megabyte_jax.planning.plans import (
  Plan,
  axes_text,
  changed,
  decoding_bytes,
  for_step,
  for_tpu,
  make_plan,
  state_bytes,
  windows_of,
)

_REMAT: tuple[Remat, ...] = ("none", "named", "full")  # from the fastest to the smallest
_MOST_PARTS = 64
_DOUBLINGS = 4
_WORTH_DOUBLING = 1.1  # a batch twice as large, of half as many steps, should save a tenth of the time
# Of a device's memory; meshes differed by less than a tenth where rows and rematerialisation were equal.
_HOPELESS = 1.15


def search(
  config: Config,
  topology: str,
  devices: list[jax.Device],
  step: str = "train",
  *,
  tries: int = 8,
  batch_sizes: Sequence[int] = (),
) -> tuple[Plan, Any]:
  """Returns the first plan that fits, and its executable; prints each attempt to stderr.

  Args:
    config: the run; its mesh, rematerialisation and accumulation are replaced.
    topology: its name (KIND:SIZE), for the report.
    devices: those of `topologies.topology_devices`.
    step: train | eval | generate.
    tries: combinations that are compiled at most.
    batch_sizes: windows per step to try; empty tries the config's and up to 16 times as many. A doubling must save a
      tenth of the time per byte to be preferred. Of no effect on evaluation whose config.eval.batch_size is set.

  Raises:
    ConfigError: nothing divides evenly, or nothing that was tried fits.
  """
  if step == "eval" and config.eval.batch_size:
    batch_sizes = [config.batch_size]  # how many windows are scored at once is given
  batch_sizes = batch_sizes or [config.batch_size << n for n in range(_DOUBLINGS + 1)]
  sized = [changed(config, batch_size=size) if size != config.batch_size else config for size in batch_sizes]
  ordered = [one for _, one in sorted(_priced(config, sized, devices, step), key=lambda priced: priced[0])]
  if not ordered:
    raise ConfigError(
      f"no mesh of {len(devices)} devices has room for the parameters and divides a batch of "
      f"{' or '.join(str(windows_of(each, step)) for each in sized)}; try another --batch_size or number of chips"
    )
  begin = f"searching {len(ordered):,} combinations for {topology} with --tries={tries}"
  print(f"{begin}; each try can take minutes", file=sys.stderr, flush=True)
  failed: list[Plan] = []
  while ordered and len(failed) < tries:
    one = choose(ordered, failed, config.model.remat, last=len(failed) == tries - 1)
    for quick in (True, False):
      plan, executable = make_plan(one, topology, devices, step, quick=quick)
      print(_line(plan), file=sys.stderr, flush=True)
      if not plan.fits:
        break
    if plan.fits:
      return plan, executable
    failed.append(plan)
    ordered = [other for other in ordered if other is not one and not rules_out(plan, other)]
  none_left = "no other is likely to fit; take more chips or a smaller --batch_size"
  left = f"{len(ordered):,} others are untried: raise --tries" if ordered else none_left
  tried = (
    "the combination tried does not fit" if len(failed) == 1 else f"none of the {len(failed)} combinations tried fits"
  )
  raise ConfigError(f"{tried} {topology}; {left}")


def choose(ordered: Sequence[Config], failed: Sequence[Plan], remat: Remat, *, last: bool) -> Config:
  """Returns which candidate to compile next.

  It is the first that no failure makes unlikely to fit. The last try is kept for the run's own rematerialisation, if
  none had it, with the fewest rows at once: it is the likeliest to fit.

  Args:
    ordered: candidates that are not ruled out, the fastest first.
    failed: plans that did not fit.
    remat: the run's own rematerialisation.
    last: True if there are no more tries.
  """
  own = [one for one in ordered if one.model.remat == remat]
  if last and failed and own and all(plan.config.model.remat != remat for plan in failed):
    return min(own, key=_rows)
  likely = (one for one in ordered if not any(expected_bytes(plan, one) > plan.memory for plan in failed))
  return next(likely, ordered[0])


def _priced(
  config: Config, sized: Sequence[Config], devices: list[jax.Device], step: str
) -> Iterator[tuple[float, Config]]:
  """Yields all candidates with their estimated seconds per window, more for larger batches.

  Each program comes once: in evaluation with the most windows that fill it.
  """
  seen = set()
  for each in sorted(sized, key=lambda config: windows_of(config, step), reverse=True):
    windows = windows_of(each, step)
    worth = _WORTH_DOUBLING ** math.log2(windows / windows_of(config, step)) / windows
    for one in candidates(each, devices, step):
      program = (one.mesh, one.batch_size, one.accumulate, one.model.remat)
      if program not in seen:
        seen.add(program)
        yield estimate(one, devices, step) * worth, one


def candidates(config: Config, devices: list[jax.Device], step: str) -> list[Config]:
  """Returns all combinations for the config's batch size that divide evenly and whose state alone fits."""
  config = for_tpu(config)
  found = []
  for mesh_config in _meshes(config, devices, step):
    if state_bytes(config, mesh_config, step) > _memory(devices):
      continue
    sizes = dataclasses.asdict(mesh_config)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    rows = for_step(config, step, mesh_config.data * mesh_config.fsdp)
    for parts in _powers(_MOST_PARTS) if step == "train" else (1,):
      if rows.batch_size % parts:
        break
      try:
        check_mesh(mesh, config.model, rows.batch_size // parts)
      except ConfigError:
        break
      for remat in _REMAT if step == "train" else (config.model.remat,):
        model = dataclasses.replace(config.model, remat=remat)
        found.append(dataclasses.replace(rows, mesh=mesh_config, accumulate=parts, model=model))
  return found


def _meshes(config: Config, devices: list[jax.Device], step: str) -> Iterator[MeshConfig]:
  """Yields meshes of all devices on which every slice holds the same number of replicas.

  Generation spreads nothing over `seq`, whose devices would all do the same: it is 1 there.
  """
  slices = _slices(devices)
  each = len(devices) // slices
  seqs = _powers(each) if config.model.sequence_parts and step != "generate" else (1,)
  for seq, tensor, replicas in itertools.product(seqs, (1, 2, 4), _powers(each)):
    if each % (seq * tensor * replicas) == 0:
      yield MeshConfig(data=slices * replicas, fsdp=each // (seq * tensor * replicas), seq=seq, tensor=tensor)


def _powers(largest: int) -> list[int]:
  return [2**n for n in range(largest.bit_length())]


def _slices(devices: list[jax.Device]) -> int:
  return len({getattr(device, "slice_index", 0) for device in devices})


def _memory(devices: list[jax.Device]) -> float:
  return hardware.tpu_chip(devices[0]).memory / hardware.devices_per_chip(devices[0])


def estimate(config: Config, devices: list[jax.Device], step: str) -> float:
  """Estimates the seconds of a step in closed form, without overlap; it decides what is compiled first."""
  mesh, model = config.mesh, config.model
  parameters, training = model.parameter_count(), step == "train"
  forward_passes = flops.TRAINING_FACTOR if training else 1
  sent = 2 * parameters / mesh.tensor * (1 - 1 / mesh.fsdp) * forward_passes * config.accumulate
  slices = _slices(devices)
  replicas, gradients = mesh.data // slices, 2 * parameters / (mesh.fsdp * mesh.tensor) * training
  sent += 2 * gradients * (1 - 1 / replicas)
  rows = config.batch_size / (mesh.data * mesh.fsdp)
  sums = 2 if not training else 5 if model.remat == "full" else 4  # of a layer
  for level, slots, span in zip(model.levels, model.slots, model.spans, strict=True):
    if mesh.seq > 1 and span == model.context:  # keys and values are gathered
      sent += rows * slots * 2 * 2 * level.width / mesh.tensor * level.num_layers * forward_passes
    if mesh.tensor > 1:  # activations are summed over devices, which sends each almost twice
      sent += rows * slots / mesh.seq * 2 * 2 * level.width * level.num_layers * sums * (1 - 1 / mesh.tensor)
  # Gradients are summed within a slice first: then each device sends its part of them to the other slices.
  between = 2 * 2 * parameters * training * slices / len(devices) * (1 - 1 / slices)
  bounds = roofline.bounds(config, devices[0], len(devices), mesh.tensor, step, sent, between)
  one_after_the_other = config.accumulate * 1e-3
  return bounds.compute + bounds.memory + bounds.links + bounds.network + one_after_the_other


def rules_out(failed: Plan, one: Config) -> bool:
  """Returns True if `failed` implies that `one` will not fit: it surely needs as much, or by its rows far too much."""
  return needs_at_least(one, failed.config) or expected_bytes(failed, one) > _HOPELESS * failed.memory


def expected_bytes(failed: Plan, one: Config) -> float:
  """Estimates what `one` needs from what `failed` needed; 0 where their rematerialisation differs."""
  other = failed.config
  if other.model.remat != one.model.remat:
    return 0.0
  if failed.step == "generate":
    return decoding_bytes(other, failed.total, one)
  state = state_bytes(other, other.mesh, failed.step)
  more_rows = _rows(one) / _rows(other)  # what is not state grows with the rows, whatever the mesh
  return state_bytes(one, one.mesh, failed.step) + (failed.total - state) * more_rows


def _rows(config: Config) -> float:
  """Returns the windows that are processed at once."""
  return config.batch_size / config.accumulate


def needs_at_least(one: Config, other: Config) -> bool:
  """Returns True if `one` surely needs the memory of `other`: same mesh, no less kept, no fewer rows at once."""
  return (
    one.mesh == other.mesh
    and _rows(one) >= _rows(other)
    and _REMAT.index(one.model.remat) <= _REMAT.index(other.model.remat)
  )


def _line(plan: Plan) -> str:
  sizes = f"{plan.total / 2**30:.1f} of {plan.memory / 2**30:.1f} GiB"
  time = f", {1e3 * plan.bounds.step:.0f} ms at best" if plan.fits and plan.bounds else ""
  return (
    f"{'tried' if plan.quick else 'checked'} batch {plan.config.batch_size}, {axes_text(plan.mesh)}, "
    f"remat {plan.config.model.remat}, {plan.config.accumulate} parts: "
    f"{'fits' if plan.fits else 'too large'}, {sizes}{time}"
  )
