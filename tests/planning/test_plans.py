"""Planning for TPUs without one. What compiles needs libtpu, pip install "jax[tpu]", and is skipped without it."""

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.serialize_executable import deserialize_and_load

from megabyte_jax.commands import plan
from megabyte_jax.config import Config, EvalConfig, Level, MegabyteConfig, MeshConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation.evaluate import make_eval_step
from megabyte_jax.models import flops
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh, parse_mesh
from megabyte_jax.planning import plans, roofline, search, topologies
from megabyte_jax.planning.lowering import lower
from megabyte_jax.training.state import initial_state

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"'
)
TOPOLOGY = "v5e:2x2"
pytestmark = pytest.mark.usefixtures("full_compile")


def level(patch_size, width, **options):
  return Level(patch_size=patch_size, width=width, num_layers=2, num_heads=2, **options)


SMALL = Config(
  model=MegabyteConfig(context=1024, levels=(level(8, 128), level(1, 64)), dropout=0.0),
  mesh=MeshConfig(data=1, fsdp=2, seq=2),
  batch_size=8,
  num_steps=1000,
)


def test_mesh_and_batch_of_the_command_line():
  assert parse_mesh("fsdp=16,seq=4") == MeshConfig(data=-1, fsdp=16, seq=4)
  assert parse_mesh("fsdp=-1,seq=4") == MeshConfig(data=1, fsdp=-1, seq=4)
  with pytest.raises(ConfigError, match="write it like"):
    parse_mesh("fdsp=16")
  with pytest.raises(ConfigError, match="fsdp is given twice"):
    parse_mesh("fsdp=2,fsdp=4")
  larger = plans.changed(SMALL, batch_size=16, accumulate=2, remat="full", mesh="seq=4")
  assert (larger.batch_size, larger.num_steps, larger.accumulate, larger.model.remat) == (16, 500, 2, "full")


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r'pip install "jax\[tpu\]"'):
    topologies.topology_devices(TOPOLOGY)


def test_recomputation_costs_time_but_counts_as_no_use(monkeypatch):
  class Device:
    device_kind, num_cores = "TPU v5 lite", 1

  times = {}
  for remat in ("none", "full"):
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, remat=remat))
    times[remat] = roofline.bounds(config, Device(), 4, 1, "train", 0.0)
  assert times["full"].compute == pytest.approx(4 / 3 * times["none"].compute)
  assert times["full"].model_compute == times["none"].compute
  work = flops.flops_per_byte(SMALL.model, training=True) * 8 * 1024
  assert times["none"].compute == pytest.approx(work / 4 / 197e12)
  apart = roofline.bounds(SMALL, Device(), 4, 1, "train", 1e6, 1e9)  # 25 Gbit/s
  assert apart.step == apart.network == pytest.approx(1e9 / 3.125e9)


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
    return plans.Plan(config=config, step="train", topology=TOPOLOGY, kind="", mesh={}, **sizes)

  assert search.rules_out(failed("none", 1, 110 * mb), variant("none", 4))
  assert not search.rules_out(failed("none", 1, 110 * mb), variant("none", 8))
  assert not search.rules_out(failed("none", 1, 110 * mb), variant("full", 1))
  assert search.rules_out(failed("none", 1, 40 * mb), dataclasses.replace(variant("none", 1), batch_size=16))


@pytest.mark.slow
def test_saved_executable_runs_without_compiling(tmp_path):
  devices = jax.devices()[:4]
  mesh = make_mesh(SMALL.mesh, devices)
  plan.save(lower(SMALL, mesh, "eval").compile(), tmp_path / "step.pickle")
  assert [path.name for path in tmp_path.iterdir()] == ["step.pickle"]
  loaded = deserialize_and_load(*pickle.loads((tmp_path / "step.pickle").read_bytes()), execution_devices=devices)
  with jax.set_mesh(mesh):
    parameters = initial_state(SMALL, mesh).parameters
    x_BT = np.random.default_rng(0).integers(0, 256, (8, 1024), np.uint8)
    arguments = jax.device_put((x_BT, np.full(8, 1024, np.int32)), batch_sharding(mesh))
    expected_BT = make_eval_step(SMALL)(parameters, *arguments)
  np.testing.assert_array_equal(loaded(parameters, *arguments), expected_BT)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:3x77"])
def test_unknown_topology_is_one_clear_error(topology):
  with pytest.raises(ConfigError, match="libtpu has no topology"):
    topologies.topology_devices(topology)


@needs_libtpu
def test_nothing_is_said_of_the_tpu_that_is_not_here():
  code = f"from megabyte_jax.planning import plans; print(len(topologies.topology_devices({TOPOLOGY!r})))"
  here = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "TF_CPP"))}
  done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ("4\n", "")


@needs_libtpu
def test_devices_of_a_chip():
  from megabyte_jax.parallel import hardware  # noqa: PLC0415

  for topology, devices, per_chip in (("v4:2x2x2", 16, 2), ("v5p:2x2x2", 8, 1), ("tpu7x:2x2x2", 16, 2)):
    found = topologies.topology_devices(topology)
    assert (len(found), hardware.devices_per_chip(found[0])) == (devices, per_chip)


@dataclasses.dataclass(frozen=True)
class Chip:
  """As much of a TPU device as laying out a mesh looks at."""

  id: int
  coords: tuple[int, int, int]
  slice_index: int = 0
  device_kind: str = "TPU v6 lite"
  platform: str = "tpu"
  process_index: int = 0
  core_on_chip: int = 0
  client = None


def test_mesh_axes_may_cut_the_torus():
  chips = [Chip(8 * y + x, (x, y, 0)) for y in range(8) for x in range(8)]
  assert make_mesh(MeshConfig(data=1, fsdp=32, seq=2), chips).devices.shape == (1, 32, 2, 1)  # 32 = 8 x half of 8


def test_slices_hold_replicas():
  chips = [Chip(4 * s + 2 * y + x, (x, y, 0), s, process_index=s) for s in range(2) for y in range(2) for x in range(2)]
  mesh = make_mesh(MeshConfig(data=2, fsdp=4), chips)
  assert [{chip.slice_index for chip in replica.flat} for replica in mesh.devices] == [{0}, {1}]
  with pytest.raises(ConfigError, match="take a multiple of 2"):
    make_mesh(MeshConfig(data=1, fsdp=8), chips)


def test_search_tries_batches_replicas_and_slices():
  def chips(slices):
    places = [(s, x, y) for s in range(slices) for x in range(2) for y in range(2)]
    return [Chip(i, (x, y, 0), s, device_kind="TPU v5 lite") for i, (s, x, y) in enumerate(places)]

  meshes = {(one.mesh.data, one.mesh.fsdp, one.mesh.seq) for one in search.candidates(SMALL, chips(1), "eval")}
  assert {(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)} <= meshes
  assert {one.mesh.data for one in search.candidates(SMALL, chips(2), "train")} == {2, 4, 8}
  model = dataclasses.replace(SMALL.model, levels=(level(8, 16_384), level(1, 64)))  # 6.4 billion parameters
  large = dataclasses.replace(SMALL, model=model)
  assert {one.mesh.fsdp * one.mesh.tensor for one in search.candidates(large, chips(2), "eval")} == {2, 4}
  # Evaluation pads its windows to whole replicas, as `evaluate` does.
  three = dataclasses.replace(SMALL, eval=EvalConfig(batch_size=3))
  assert {(one.mesh.data * one.mesh.fsdp, one.batch_size) for one in search.candidates(three, chips(1), "eval")} >= {
    (4, 4),
    (2, 4),
    (1, 3),
  }
  padded = plans.for_step(three, "eval", 4)
  assert (padded.batch_size, plans.windows_of(padded, "eval")) == (4, 3) and plans.for_step(padded, "eval", 4) == padded
  # Windows that are added to fill replicas are not counted as work, and each program is tried once.
  one_window = dataclasses.replace(SMALL, eval=EvalConfig(batch_size=1))
  for batch in (one_window, SMALL):
    priced = list(search._priced(batch, [batch, batch], chips(1), "eval"))
    windows = batch.scored_at_once
    assert all(price == pytest.approx(search.estimate(one, chips(1), "eval") / windows) for price, one in priced)
    assert len({(str(one.mesh), one.batch_size) for _, one in priced}) == len(priced) > 3
  # The links of a slice are faster than the network between slices, which gradients alone take.
  one = dataclasses.replace(SMALL, mesh=MeshConfig(data=2, fsdp=4))
  slow, fast = (search.estimate(one, devices, "train") for devices in (chips(2), chips(1) * 2))
  assert slow > fast


def test_the_cost_of_a_run_is_said_in_time_and_chip_hours():
  bounds = roofline.Bounds(compute=3.6, memory=1.0, links=0.5, model_compute=2.7)
  config = dataclasses.replace(SMALL, num_steps=100)
  found = plans.Plan(config, "train", "v5p:4x8x8", "TPU v5", 256, 256, {"fsdp": 16}, 95 * 2**30, bounds=bounds)
  line = plan.describe(found).splitlines()[-1]
  assert line.startswith("run         100 steps, ") and line.endswith(": 6m00s and 25.6 chip-hours at best")


@needs_libtpu
def test_train_step_for_four_chips(tmp_path):
  devices = topologies.topology_devices(TOPOLOGY)
  found, executable = plans.make_plan(SMALL, TOPOLOGY, devices, quick=True)  # .ci/slow compiles a step fully
  assert found.quick and found.fits and found.memory == 15.75 * 2**30
  assert found.config.model.compute_dtype == "bfloat16"
  assert "tpu_custom_call" in executable.as_text(), "the global model has 128 slots: auto takes splash"
  # Value and two moments in float32, halved over fsdp (small ones are whole), and the batch.
  share = 12 * SMALL.model.parameter_count()
  assert share / 2 < found.arguments < share
  assert found.wire and all(count > 0 and sent > 0 for count, sent in found.wire.values())
  assert found.bounds.mfu <= 1
  text, values = plan.describe(found), json.loads(plan.to_json(found))
  assert "fits        yes" in text and "fsdp=2,seq=2" in text
  assert values["days"] == pytest.approx(1000 * found.bounds.step / 86_400)
  plan.save(executable, tmp_path / "step.pickle")
  _, in_tree, out_tree = pickle.loads((tmp_path / "step.pickle").read_bytes())
  assert (in_tree, out_tree) == (executable.in_tree, executable.out_tree)


@needs_libtpu
def test_search_over_two_slices_ends_with_the_real_program(capsys):
  devices = topologies.topology_devices(TOPOLOGY, 2)
  found, executable = search.search(SMALL, TOPOLOGY, devices, "eval", batch_sizes=[8])
  assert found.fits and not found.quick and executable is not None
  assert (found.chips, found.mesh["data"] % 2) == (8, 0)
  tried, checked = capsys.readouterr().err.splitlines()
  assert tried.startswith("tried batch 8, ") and checked == tried.replace("tried", "checked")


@needs_libtpu
@pytest.mark.slow
def test_gradients_between_slices_go_at_the_networks_rate():
  config = dataclasses.replace(SMALL, mesh=MeshConfig(data=2, fsdp=4))
  found, _ = plans.make_plan(config, TOPOLOGY, topologies.topology_devices(TOPOLOGY, 2), quick=True)
  [(count, sent)] = [size for kind, size in found.wire.items() if kind.endswith("between slices")]
  # In bfloat16, summed by two slices: each device sends its quarter of them once, and small ones whole.
  gradients = 2 * SMALL.model.parameter_count() / 4
  assert count > 0 and gradients < sent < 2 * gradients
  assert found.bounds.network == pytest.approx(sent / 3.125e9)
  assert found.bounds.step == found.bounds.network, "this small model's links and compute take less"
  assert f"network {1e3 * found.bounds.network:.1f} ms" in plan.describe(found)


@needs_libtpu
@pytest.mark.parametrize("step", ["eval", "generate"])
def test_other_steps(step):
  model = PerceiverARConfig(context=256, latents=128, width=64, num_layers=1, num_heads=2, dropout=0.0)
  config = dataclasses.replace(SMALL, model=model if step == "eval" else SMALL.model, mesh=MeshConfig(fsdp=4, data=1))
  found, _ = plans.make_plan(config, TOPOLOGY, topologies.topology_devices(TOPOLOGY), step)
  assert found.fits
  assert found.days is None


@needs_libtpu
def test_too_large_is_an_answer():
  levels = (level(8, 8192, ff_width=65_536), level(1, 64))
  config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, levels=levels))
  found, executable = plans.make_plan(config, TOPOLOGY, topologies.topology_devices(TOPOLOGY))
  assert not found.fits and executable is None
  assert found.total > found.memory
  assert "fits        no" in plan.describe(found)


def test_decoding_has_the_parameters_as_generation_casts_them():
  model = dataclasses.replace(SMALL.model, compute_dtype="bfloat16")
  lowered = lower(dataclasses.replace(SMALL, model=model), make_mesh(MeshConfig(data=1), jax.devices()[:1]), "generate")
  parameters, *_ = lowered.args_info[0]
  wide = [
    jax.tree_util.keystr(path, simple=True, separator=".")
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)
    if leaf.dtype == jnp.float32
  ]
  assert wide and all("norm" in name for name in wide)


def test_flags_are_the_documented_ones():
  documented = {"config", "topology", "mesh", "batch_size", "remat", "step", "quick", "search", "save", "json"}
  assert documented <= set(vars(plan.parse_arguments(["--config=tests/tiny_config.py"])))


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("v5p-512", "its 256 chips are v5p:4x8x8"),
    ("v5litepod-256", "its 256 chips are v5e:16x16"),
    ("v6e-8", "its 8 chips are v6e:2x4"),
    ("tpu7x-128", "its 64 chips are tpu7x:4x4x4"),
    ("tpu7x:64", "its 64 chips are tpu7x:4x4x4"),
    ("v5p-8", "its 4 chips are v5p:2x2x1"),
    ("v5e-1", ""),
    ("v5e-512", ""),
    ("v4-48", "write its 24 chips as sides, such as v4:4x4x4"),
    ("v5p:4x4x4", ""),
    ("h100", ""),
  ],
)
def test_cloud_names_are_translated_to_chips(name, told):
  assert topologies.in_chips(name) == told
