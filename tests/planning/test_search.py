"""The order in which `plan --search` compiles, without a compiler."""

import dataclasses

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
