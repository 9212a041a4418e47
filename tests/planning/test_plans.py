"""Planning for TPUs without one. What compiles needs libtpu, pip install "jax[tpu]", and is skipped without it."""

import dataclasses
import importlib.util
import json
import pathlib
import pickle
import shlex

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


def test_another_batch_keeps_the_parts_of_the_config():
  assert plans.changed(dataclasses.replace(SMALL, accumulate=4), batch_size=16).accumulate == 4
  of_quickstart = ["--config=configs/quickstart.py", "--config.accumulate=64", "--batch_size=512"]
  args = plan.parse_arguments(of_quickstart)  # whose batch of 32 has no 64 parts
  config = plans.changed(Config.from_dict(args.config), batch_size=args.batch_size, accumulate=args.accumulate)
  assert (config.batch_size, config.accumulate) == (512, 64)
  args = plan.parse_arguments([*of_quickstart, "--accumulate=8"])
  assert args.accumulate == 8


def test_an_error_names_the_flags_of_plan_before_anything_is_compiled(monkeypatch, capsys):
  monkeypatch.setattr(topologies, "topology_devices", lambda *_: jax.devices()[:4])
  with pytest.raises(ConfigError, match=r"or --batch_size=4 or 8 \(times --accumulate, which could"):
    plan.main(["--config=configs/quickstart.py", "--batch_size=6", "--mesh=fsdp=4", "--topology=v5e:2x2"])
  assert capsys.readouterr() == ("", "")


def test_what_to_try_where_a_step_does_not_fit():
  gib = 2**30
  sizes = {"step": "train", "topology": "", "kind": "", "devices": 8, "chips": 8, "memory": 16 * gib}

  def told(total, mesh, step="train", config=SMALL):
    found = plans.Plan(**sizes | {"step": step}, config=config, mesh=mesh, total=total, reason="why")
    return plan.describe(found).partition("fits        no: why\ntry         ")[2].splitlines()[0]

  wide = dataclasses.replace(SMALL, batch_size=64)
  assert told(60 * gib, {"fsdp": 4, "seq": 2}, config=wide) == (
    "--accumulate=4 (up to 16 on this mesh), --remat=full, a larger seq with a smaller fsdp, more chips, or --search"
  )
  assert "--accumulate=16 (up to 16 on this mesh)" in told(900 * gib, {"fsdp": 4, "seq": 2}, config=wide)
  assert told(60 * gib, {"data": 8}).startswith("--remat=full, a larger seq with a smaller data, ")
  one = dataclasses.replace(SMALL, batch_size=1, model=dataclasses.replace(SMALL.model, remat="full"))
  assert told(60 * gib, {"seq": 8}, config=one) == "more chips, or --search"
  assert told(60 * gib, {"data": 8}, "eval").startswith("a smaller --config.eval.batch_size, ")
  large = dataclasses.replace(SMALL.model, levels=(level(8, 16_384), level(1, 64)))
  assert told(60 * gib, {"data": 8}, config=dataclasses.replace(SMALL, model=large)).startswith("a larger fsdp, ")


def test_what_to_try_where_generation_does_not_fit():
  def told(batch_size, **sizes):
    config = dataclasses.replace(SMALL, batch_size=batch_size)
    return plans.remedies(plans.Plan(config, "generate", "", "", 8, 8, sizes, 16 * 2**30, total=60 * 2**30))

  # Without a larger seq, over which decoding spreads nothing.
  assert told(64, data=2, fsdp=4) == "a smaller --batch_size, more chips, or --search"
  assert told(8, data=8) == "more chips, or --search"  # a row a device


def test_the_compilers_reason_is_in_the_units_of_the_plan():
  found = plans.Plan(SMALL, "train", "", "", 4, 4, {"fsdp": 4}, 16 * 2**30)
  plans._read_shortage(found, "RESOURCE_EXHAUSTED: Ran out: required (17.70G) exceeds available HBM (15.75G). More")
  assert found.reason == "Ran out: required (17.70 GiB) exceeds available HBM (15.75 GiB)"
  assert found.total == int(17.70 * 2**30)


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


def test_the_page_shows_the_bounds_and_the_cost_of_its_plan():
  """What is computed in closed form is as it is shown; what libtpu counts is not compiled here."""

  class Device:
    device_kind, num_cores = "TPU v5", 2

  page = (pathlib.Path(plan.__file__).parents[2] / "docs/plan_a_pod.md").read_text()
  command = page.partition("python -m megabyte_jax plan ")[2].partition("```")[0].replace("\\\n", " ")
  args = plan.parse_arguments(shlex.split(command))
  config = plans.changed(
    Config.from_dict(args.config),
    batch_size=args.batch_size,
    accumulate=args.accumulate,
    remat=args.remat,
    mesh=args.mesh,
  )
  bounds = roofline.bounds(config, Device(), 256, 1, "train", 0.0)
  assert f"compute {1e3 * bounds.compute:.1f} ms, memory ~{1e3 * bounds.memory:.1f} ms" in page
  hours = 256 * config.num_steps * bounds.step / 3600
  assert f"run         {config.num_steps} steps, " in page and f"{hours:.1f} chip-hours at best" in page
  assert f"take {hours:.1f} chip-hours *at best*" in page and f"{2 * hours:.0f} chip-hours, is a cautious" in page
  full = dataclasses.replace(config, accumulate=8, model=dataclasses.replace(config.model, remat="full"))
  hours = 256 * config.num_steps * roofline.bounds(full, Device(), 256, 1, "train", 0.0).step / 3600
  assert f"MFU 75% at most, {hours:.1f} chip-hours" in " ".join(page.split())


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
  begin, tried, checked = capsys.readouterr().err.splitlines()
  assert begin.startswith("searching ") and "for v5e:2x2 with --tries=8; " in begin
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
