"""Which mesh, rematerialisation and accumulation a topology should be used with: `plan --search`.

Every combination that divides evenly is ordered by its time in closed form; then they are compiled one after the
other, fastest first, until one fits: first quickly, and then, if that fits, as the real program. What a program that
does not fit rules out is not compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import jax

from megabyte_jax import flops, hardware, roofline
from megabyte_jax.config import Config, ConfigError, MegabyteConfig, MeshConfig
from megabyte_jax.plan import Plan, for_tpu, make_plan
from megabyte_jax.sharding import check_mesh, make_mesh

_REMAT = ("none", "named", "full")  # from the fastest to the smallest
_MOST_PARTS = 64
# Of a device's memory; meshes differed by less than a tenth where rows and rematerialisation were equal.
_HOPELESS = 1.25


def search(
  config: Config, topology: str, devices: list[jax.Device], step: str = "train", *, tries: int = 8
) -> tuple[Plan, Any]:
  """The first plan that fits, and its executable; what was tried goes to stderr.

  Args:
    tries: combinations that are compiled at most.

  Raises:
    ConfigError: nothing divides evenly, or nothing that was tried fits.
  """
  ordered = sorted(candidates(config, devices, step), key=lambda one: estimate(one, devices, step))
  if not ordered:
    raise ConfigError(
      f"no mesh of {len(devices)} devices divides a batch of {config.batch_size}; try another --batch_size"
    )
  failed: list[Plan] = []
  for one in ordered:
    if any(rules_out(other, one) for other in failed):
      continue
    for quick in (True, False):
      plan, executable = make_plan(one, topology, devices, step, quick=quick)
      print(_line(plan), file=sys.stderr, flush=True)
      if not plan.fits:
        break
    if plan.fits:
      return plan, executable
    failed.append(plan)
    if len(failed) == tries:
      break
  raise ConfigError(f"none of the {len(failed)} combinations tried fits {topology}; raise --tries or take more chips")


def candidates(config: Config, devices: list[jax.Device], step: str) -> list[Config]:
  """All combinations that divide evenly. Replicas (`data`) are not tried: on one slice fsdp needs less memory."""
  config = for_tpu(config)
  found = []
  powers = [2**n for n in range(11)]
  seqs = powers if isinstance(config.model, MegabyteConfig) else (1,)
  for seq, tensor in itertools.product(seqs, (1, 2, 4)):
    if len(devices) % (seq * tensor):
      continue
    mesh_config = MeshConfig(data=1, fsdp=len(devices) // (seq * tensor), seq=seq, tensor=tensor)
    mesh = make_mesh(mesh_config, devices)
    for parts in powers if step == "train" else (1,):
      if parts > _MOST_PARTS or config.batch_size % parts:
        break
      try:
        check_mesh(mesh, config.model, config.batch_size // parts)
      except ConfigError:
        break
      for remat in _REMAT if step == "train" else (config.model.remat,):
        model = dataclasses.replace(config.model, remat=remat)
        found.append(dataclasses.replace(config, mesh=mesh_config, accumulate=parts, model=model))
  return found


def estimate(config: Config, devices: list[jax.Device], step: str) -> float:
  """Seconds of a step in closed form, its parts added up: what to compile first."""
  mesh, model = config.mesh, config.model
  parameters = flops.parameter_count(model)
  forward_passes = 3 if step == "train" else 1
  sent = 2 * parameters / mesh.tensor * forward_passes * (mesh.fsdp > 1) * config.accumulate
  rows = config.batch_size / mesh.fsdp
  if isinstance(model, MegabyteConfig):
    for level, span in zip(model.levels, model.spans, strict=True):
      slots = model.context // level.patch_size
      if mesh.seq > 1 and span == model.context:  # keys and values are gathered
        sent += rows * slots * 2 * 2 * level.width / mesh.tensor * level.num_layers * forward_passes
      if mesh.tensor > 1:  # two sums over devices a layer
        sent += rows * slots / mesh.seq * 4 * 2 * level.width * level.num_layers * forward_passes
  chip = hardware.tpu_chip(devices[0])
  bounds = roofline.bounds(config, devices[0], len(devices), mesh.tensor, step, sent)
  one_after_the_other = config.accumulate * 1e-3
  return bounds.compute + bounds.memory + sent / (2 * chip.link_rate) + one_after_the_other


def rules_out(failed: Plan, one: Config) -> bool:
  """Whether `one` is not worth compiling after `failed`: it needs as much for sure, or by its rows far too much."""
  other = failed.config
  expected = failed.total * other.accumulate / one.accumulate  # most of it grows with the rows, whatever the mesh
  same = other.model.remat == one.model.remat
  return needs_at_least(one, other) or (same and expected > _HOPELESS * failed.memory)


def needs_at_least(one: Config, other: Config) -> bool:
  """Whether `one` surely needs the memory of `other`: the same mesh, no less kept and no fewer rows at once."""
  return (
    one.mesh == other.mesh
    and one.accumulate <= other.accumulate
    and _REMAT.index(one.model.remat) <= _REMAT.index(other.model.remat)
  )


def _line(plan: Plan) -> str:
  axes = ",".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1) or "one device"
  sizes = f"{plan.total / 2**30:.1f} of {plan.memory / 2**30:.1f} GiB"
  time = f", {1e3 * plan.bounds.step:.0f} ms at best" if plan.fits and plan.bounds else ""
  return (
    f"{'tried' if plan.quick else 'checked'} {axes}, remat {plan.config.model.remat}, {plan.config.accumulate} parts: "
    f"{'fits' if plan.fits else 'too large'}, {sizes}{time}"
  )
