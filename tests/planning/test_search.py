"""The order in which `plan --search` compiles, without a compiler."""

import dataclasses

import pytest

from megabyte_jax.config import Config, Level, MegabyteConfig, MeshConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.planning import plans, search

GB = 2**30


def level(patch_size, width):
  return Level(patch_size=patch_size, width=width, num_layers=2, num_heads=2)


SMALL = Config(
  model=MegabyteConfig(context=1024, levels=(level(8, 128), level(1, 64)), dropout=0.0, remat="full"),
  mesh=MeshConfig(data=1, fsdp=2, seq=2),
  batch_size=8,
  num_steps=1000,
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """As much of a TPU device as the search looks at."""

  device_kind = "TPU v5 lite"
  num_cores = 1


def searched(monkeypatch, capsys, gigabytes, tries):
  """Searches four chips; `gigabytes` of a config is what it needs. Returns (parts, remat) as tried, and the error."""
  tried = []

  def make_plan(config, topology, devices, step, *, quick):
    needs = int(gigabytes(config) * GB)
    sizes = {"memory": 16 * GB, "total": needs, "fits": needs <= 16 * GB, "devices": 4, "chips": 4}
    tried.append((config.accumulate, config.model.remat))
    return plans.Plan(config=config, step=step, topology=topology, kind="", mesh={}, quick=quick, **sizes), quick

  monkeypatch.setattr(search, "make_plan", make_plan)
  try:
    plan, _ = search.search(SMALL, "v5e:2x2", [Chip()] * 4, tries=tries, batch_sizes=[8])
    assert tried[-1] == tried[-2] and plan.fits
    return tried[:-1], ""
  except ConfigError as error:
    return tried, str(error)
  finally:
    capsys.readouterr()


def test_after_a_near_miss_come_more_recomputation_and_more_parts(monkeypatch, capsys):
  tried, error = searched(monkeypatch, capsys, lambda one: 16.5 / one.accumulate, tries=8)
  assert tried == [(1, "none"), (1, "named"), (1, "full"), (2, "none")] and not error


def test_no_mesh_of_like_need_is_tried_before_the_next_recomputation(monkeypatch, capsys):
  needs = {"none": 16.5, "named": 16.2, "full": 3}
  tried, error = searched(monkeypatch, capsys, lambda one: needs[one.model.remat], tries=12)
  assert len(set(tried)) == len(tried) and tried[-1][1] == "full" and not error


def test_the_last_try_is_for_the_remat_of_the_run(monkeypatch, capsys):
  def needs(one):
    return {"none": 200, "named": 100, "full": 20}[one.model.remat] / one.accumulate**0.5

  tried, error = searched(monkeypatch, capsys, needs, tries=3)
  assert tried[-1] == (8, "full") and {remat for _, remat in tried[:-1]} == {"none", "named"} and not error


def test_more_chips_are_advised_when_nothing_is_left(monkeypatch, capsys):
  _, error = searched(monkeypatch, capsys, lambda one: 17, tries=2)
  assert "none of the 2 combinations tried fits v5e:2x2; " in error
  assert "others are untried: raise --tries" in error and "more chips" not in error
  _, error = searched(monkeypatch, capsys, lambda one: 1000, tries=8)
  assert "no other is likely to fit; take more chips" in error


def test_what_cannot_fit_is_not_tried_again():
  mb = 2**20  # the state of a device is 1.6 or 3.2 of them

  def variant(remat, parts):
    return dataclasses.replace(SMALL, accumulate=parts, model=dataclasses.replace(SMALL.model, remat=remat))

  assert search.needs_at_least(variant("none", 1), variant("full", 2))
  assert not search.needs_at_least(variant("full", 2), variant("none", 1))
  assert not search.needs_at_least(variant("none", 4), variant("full", 2))

  def failed(remat, parts, needed):
    config = dataclasses.replace(variant(remat, parts), mesh=MeshConfig(data=1, fsdp=4))
    sizes = {"memory": 16 * mb, "total": needed, "devices": 4, "chips": 4}
    return plans.Plan(config=config, step="train", topology="v5e:2x2", kind="", mesh={}, **sizes)

  assert search.rules_out(failed("none", 1, 110 * mb), variant("none", 4))
  assert not search.rules_out(failed("none", 1, 110 * mb), variant("none", 8))
  assert not search.rules_out(failed("none", 1, 110 * mb), variant("full", 1))
  assert search.rules_out(failed("none", 1, 40 * mb), dataclasses.replace(variant("none", 1), batch_size=16))


def with_dtype(config, dtype):
  return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))


def test_generation_has_room_where_its_cast_parameters_fit():
  model = dataclasses.replace(SMALL.model, levels=(level(8, 16_384), level(1, 64)))
  large = dataclasses.replace(SMALL, model=model)  # 6.4 billion parameters on devices of 15.75 GiB

  def parts(config, step):
    """The numbers of devices over which the parameters are spread."""
    return {one.mesh.fsdp * one.mesh.tensor for one in search.candidates(config, [Chip()] * 4, step)}

  assert parts(large, "generate") == parts(with_dtype(large, "bfloat16"), "generate") == {1, 2, 4}
  assert parts(with_dtype(large, "float32"), "generate") == {2, 4}
  assert parts(large, "eval") == {2, 4}, "whose parameters stay float32"


def test_generation_spreads_nothing_over_seq():
  meshes = {step: [one.mesh for one in search.candidates(SMALL, [Chip()] * 4, step)] for step in ("eval", "generate")}
  assert {mesh.seq for mesh in meshes["generate"]} == {1} and {mesh.seq for mesh in meshes["eval"]} == {1, 2, 4}
  assert {(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes["generate"]} >= {(4, 1, 1), (1, 4, 1), (2, 1, 2)}


def test_what_generation_keeps_of_its_rows_is_not_spread_over_fsdp():
  def one(**sizes):
    return dataclasses.replace(SMALL, mesh=MeshConfig(**sizes))

  def expected(known, needed, other):
    sizes = {"memory": 16 * GB, "total": needed, "devices": 4, "chips": 4}
    failed = plans.Plan(config=known, step="generate", topology="v5e:2x2", kind="", mesh={}, **sizes)
    return search.expected_bytes(failed, other)

  for spread, share in (({"data": 4}, 4), ({"data": 1, "tensor": 2, "fsdp": 2}, 2), ({"data": 1, "fsdp": 4}, 1)):
    assert expected(one(data=1, fsdp=4), 20 * GB, one(**spread)) == pytest.approx(20 * GB / share, rel=0.01)
  state = plans.state_bytes(SMALL, MeshConfig(data=4), "generate")
  assert expected(one(data=4), 1.9 * state, one(data=1, fsdp=4)) == state / 4, "it may all be parameters"
