"""benchmarks/generate_speed.py and train_speed.py: what they time and say, and that a failure costs a row alone."""

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
import types

import jax
import pytest
from run_commands import ROOT, environment

from megabyte_jax.config import Config, Level, MegabyteConfig
from megabyte_jax.models import build, flops
from megabyte_jax.paper import measured, tables
from megabyte_jax.parallel.parameter_info import parameter_name

RUN = {"date": "2026-11-24T00:00:00+00:00", "command": "generate_speed.py"}


def module(monkeypatch, name):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  return importlib.import_module(name)


def test_a_results_file_fills_table_9(monkeypatch, tmp_path, capsys):
  speed = module(monkeypatch, "generate_speed")
  device = {"device": "H200", "versions": "jax 0.10"}
  rows = [{"model": speed.PEER, "batch": 1, "error": "CUDA error"}]
  rows += [speed.speeds("Transformer", batch, 4096, 5.0) | device for batch in (1, 8)]
  rows += [speed.speeds("MEGABYTE", 1, 4096, 4.0) | device, {"model": "MEGABYTE", "batch": 8, "error": "out of memory"}]
  for row in rows:
    speed.print_row(row, rows)
  assert rows[3]["speed_up"] == 1.25 and "1.25x Transformer" in capsys.readouterr().out
  (tmp_path / "speed.json").write_text(json.dumps(speed.results(rows, 4096, RUN)))
  found = {m.row: m for m in measured.from_results(tmp_path, tmp_path)}
  assert {row: m.numbers["seconds_to_generate"] for row, m in found.items()} == {
    "table9:transformer": 10.0,
    "table9:megabyte": 8.0,
  }
  ours = found["table9:megabyte"]
  assert ours.source == "speed.json" and all(part in ours.note for part in ("4,096 bytes", "H200", "2026-11-24"))
  assert "speed.json" in tables.render(["9"], "text", list(found.values()))
  assert speed.paper_speed_up() == pytest.approx(132 / 93)


def test_weights_in_eight_bits_are_timed_beside_the_others(monkeypatch, capsys):
  """Each against a Transformer of its own format, and against what it must read itself."""
  speed, asked = module(monkeypatch, "generate_speed"), []

  def seconds(config, made, batch, generated, weights):
    asked.append((len(config.levels), batch, weights))
    return {(1, ""): 8.0, (1, "int8"): 4.0, (2, ""): 6.0, (2, "int8"): 2.0}[len(config.levels), weights]

  monkeypatch.setattr(speed, "seconds_to_generate", seconds)
  monkeypatch.setattr(speed, "copy_bandwidth", lambda size: 1e6)
  monkeypatch.setattr(speed, "make_model", lambda *_: None)
  size = speed.SIZES["tiny"]
  rows = speed.measure(size, 64, [1, 8], [], lambda rows: None, ["", "int8"])
  assert asked == [(levels, batch, weights) for levels in (1, 2) for batch in (1, 8) for weights in ("", "int8")]
  found = {(row["model"], row["batch"], row.get("weights", "")): row for row in rows}
  assert found["MEGABYTE", 8, "int8"]["speed_up"] == 2.0 and found["MEGABYTE", 8, ""]["speed_up"] == 8 / 6
  assert found["MEGABYTE", 1, "int8"]["speed_up_by_weights"] == 3.0
  assert "3.00x without" in capsys.readouterr().out
  for config, row in ((size.transformer, "Transformer"), (size.megabyte, "MEGABYTE")):
    shapes = build.abstract_model(config)[1]
    steps, fewer = {1: 64, 8: 8}, 0
    for i, level in enumerate(config.levels):
      of_level = jax.tree_util.tree_map_with_path(lambda path, a: (parameter_name(path), a), shapes["levels"][i])
      for name, a in jax.tree.leaves(of_level, is_leaf=lambda node: isinstance(node, tuple)):
        info = build.parameter_info(config)[f"levels.{i}.{name}"]
        if info.kind == "matrix":  # float32 on a CPU: three bytes less a weight, and four for each output
          fewer += steps[level.patch_size] * (3 * a.size - 4 * a.size // info.fan_in)
    both = (found[row, 1, weights] for weights in ("", "int8"))
    of_format = [entry["share_of_floor"] * entry["seconds_per_8192_bytes"] for entry in both]
    assert (of_format[0] - of_format[1]) * 1e6 * 64 / 8192 == pytest.approx(fewer)
  assert {entry["seconds_to_generate"] for entry in speed.results(rows, 64, RUN)["rows"]} == {8 * 128.0, 6 * 128.0}


def test_a_peer_that_fails_costs_its_rows_and_no_more(monkeypatch, capsys):
  speed = module(monkeypatch, "generate_speed")
  broken = types.SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: no kernel image\n")
  monkeypatch.setattr(speed.own_process.subprocess, "run", lambda *_, **__: broken)
  assert speed.peer_rows() == []
  assert "MEGABYTE-pytorch could not be timed: ImportError: no kernel image" in capsys.readouterr().out


def test_a_measurement_in_its_own_process(monkeypatch, tmp_path):
  own_process = module(monkeypatch, "own_process")
  script = tmp_path / "script.py"
  script.write_text("import sys, time\nexec(sys.argv[1])\n")

  def found(code, patience=60.0):
    return own_process.last_line(str(script), [code], patience=patience)

  assert found("print('words'); print('[1, 2]')") == [1, 2]
  assert found("raise ValueError('no such card')")["error"] == "ValueError: no such card"
  assert found("sys.exit('RESOURCE_EXHAUSTED: 5 GiB')")["error"] == "out of memory: RESOURCE_EXHAUSTED: 5 GiB"
  assert found("sys.exit(3)")["error"] == "exit code 3"
  assert found("pass") == {"error": "it printed nothing"}
  assert found("time.sleep(60)", patience=1.0) == {"error": "not done after 1 s"}


def test_one_batch_of_a_peer_that_fails_is_an_error_in_its_row(monkeypatch):
  """With a stand-in for PyTorch, which need not be installed."""
  speed = module(monkeypatch, "generate_speed")
  waited, asked = [], []

  class Prime(tuple):
    __getitem__ = argmax = cpu = lambda self, *_: self

  class Model:
    def __call__(self, prime):
      asked.append(tuple(prime))
      if asked[-1][0] == 8:
        raise RuntimeError("CUDA error: invalid configuration argument\nand more")
      return prime

    to = eval = lambda self, *_: self

  nothing = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
  torch = types.ModuleType("torch")
  torch.cuda = types.SimpleNamespace(
    is_available=lambda: True, get_device_name=lambda: "H200", synchronize=lambda: waited.append(1)
  )
  torch.randint = lambda low, high, shape, device: Prime(shape)
  torch.inference_mode, torch.autocast, torch.bfloat16, torch.__version__ = nothing, nothing, "bfloat16", "2"
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setattr(speed.peers, "megabyte_pytorch", lambda config: Model())
  rows = speed.measure_peer(speed.SIZES["tiny"].megabyte, 4, [1, 8, 2])
  assert [row["batch"] for row in rows] == [1, 8, 2] and len(waited) == len(asked) == 2 * 4 + 1 + 2 * 4
  assert sorted({place for batch, place in asked if batch == 1}) == [32, 96, 160, 224]  # of a context of 256
  assert rows[1]["error"] == "CUDA error: invalid configuration argument"
  assert all(row["bytes_per_second"] > 0 and row["versions"] == "torch 2" for row in (rows[0], rows[2]))


def wanted(monkeypatch, capsys, *arguments):
  """The rows that train_speed.py would time, with all peers installed."""
  speed = module(monkeypatch, "train_speed")
  timed = []
  monkeypatch.setattr(speed.peers, "installed", lambda package: True)
  monkeypatch.setattr(speed, "in_own_process", lambda _, name, __: timed.append(name) or {"case": name, "error": "no"})
  monkeypatch.setattr(sys, "argv", ["train_speed.py", *arguments])
  speed.main()
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
  assert [row["case"] for row in rows] == timed
  assert all(row["command"] == " ".join(sys.argv) and row["date"] for row in rows)
  return timed, speed


def test_every_case_is_timed_by_default(monkeypatch, capsys):
  timed, speed = wanted(monkeypatch, capsys)
  cases = set(speed.cases()) - {"tiny"}
  assert {name for name in timed if " " not in name} == cases | {"text24:dropout=0.1"}
  beside = {f"{case} {how}" for case in ("text24", "text14") for how in speed.PEERS}
  assert {name for name in timed if " " in name} == beside and "text24 mblm fused attention" in beside


def test_a_smoke_test_starts_no_peer(monkeypatch, capsys):
  assert wanted(monkeypatch, capsys, "--cases=tiny")[0] == ["tiny"]
  assert wanted(monkeypatch, capsys, "--cases=text14,tiny", "--peers=")[0] == ["text14", "tiny"]


def test_tiers_are_timed_by_name(monkeypatch, capsys):
  timed, speed = wanted(monkeypatch, capsys, "--cases=tiers,tiny")
  assert timed == [*speed.tiers.CASES, "tiny"] and {"1e17_megabyte8", "1e18_perceiver_ar"} < set(timed)
  config = speed.config_of("1e17_megabyte4:name=adamw:batch_size=2:remat=full")
  assert (config.optimizer.name, config.batch_size, config.model.remat) == ("adamw", 2, "full")
  assert speed.config_of("1e17_megabyte4").optimizer.name == "muon"


def test_products_of_a_step_are_all_that_are_counted(monkeypatch):
  """Of every tier's models, but for those of attention."""
  tiers = module(monkeypatch, "tiers")
  for case in tiers.CASES:
    config = dataclasses.replace(tiers.tier_config(case), accumulate=2)
    parts = flops.flops_breakdown(config.model)
    a_byte = 3 * sum(number for name, number in parts.items() if not name.endswith("attention"))
    per_step = a_byte * config.bytes_per_step
    assert tiers.operations(tiers.products_of_step(config)) == pytest.approx(per_step, rel=1e-9), case
    assert 0.8e5 < config.bytes_per_step <= 2**18


def test_what_a_device_allows_at_the_widths_of_a_model(monkeypatch):
  """A step is bounded by its own products' times; on a CPU these are timed, too."""
  tiers, limits = module(monkeypatch, "tiers"), module(monkeypatch, "device_limits")
  config = tiers.tier_config("1e17_transformer")
  assert 0 < tiers.product_seconds(tiers.Product(8, 16, 4), seconds=0.001) < 10
  monkeypatch.setattr(tiers, "product_seconds", lambda product, seconds: product.inputs * 1e-6)
  found = tiers.least_seconds_by_width(config, 1e12, 1e12)
  counted = sum(times * product.inputs * 1e-6 for product, times in tiers.products_of_step(config).items())
  attention = flops.flops_breakdown(config.model)["levels[0].attention"] * 3 * 2**18
  assert found == pytest.approx(counted + (attention + limits.traffic_of_step(config)) / 1e12)


def test_the_roofline_of_a_step(monkeypatch):
  """By hand: one level of one block, of width 8 with 32 hidden units, over 16 bytes in 4 slots; two rows."""
  limits = module(monkeypatch, "device_limits")
  level = Level(patch_size=4, width=8, num_layers=1, num_heads=2)
  config = Config(model=MegabyteConfig(context=16, levels=(level,)), batch_size=2, num_steps=1)
  parameters, products = config.model.parameter_count(), flops.flops_per_byte(config.model, training=True) * 32
  block = 2 * (2 * 2 + 4 + 2 * 4 + 7) * 8 + 2 * 3 * 32
  traffic = 2 * (4 * block + 16 * 256 * 4 * 3) + 38 * parameters
  assert limits.least_seconds(config, 1e3, 1e1) == pytest.approx(products / 1e3 + traffic / 1e1)


def test_kernels_are_sorted_and_named(monkeypatch):
  kernels = module(monkeypatch, "kernels")
  times = [("product", "nvjet_tst", 3.0, 2), ("other", "fusion", 1.0, 4)]
  lines = kernels.summary(times, largest=1).splitlines()
  assert lines[0] == "kernels 4.0 ms, 6 launches: product 3.0 ms (75%), other 1.0 ms (25%)"
  assert len(lines) == 2 and "nvjet_tst" in lines[1]
  names = {"cudnn_sdpa_flash": "attention", "gemm_fusion_dot": "product", "MemcpyD2D": "copy", "loop_fusion": "other"}
  assert {name: kernels._kind(name) for name in names} == names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate_speed", "train_speed", "long_sequences"])
def test_the_smallest_size_runs_on_a_cpu(name, tmp_path):
  small = {
    "generate_speed": ["--size=tiny", "--bytes=128", "--weights=int8"],
    "train_speed": ["--cases=tiny,tiny_tier:batch_size=1:context=64", "--limit_seconds=0.2", "--seconds=0.5"],
    "long_sequences": ["--size=tiny", f"--output={tmp_path / 'long'}"],
  }
  command = [sys.executable, f"benchmarks/{name}.py", *small[name]]
  here = environment() | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=True, timeout=600)
  if name == "long_sequences":
    assert (tmp_path / "long_time.png").stat().st_size and (tmp_path / "long_memory.png").stat().st_size
    run = json.loads((tmp_path / "long.json").read_text())
    assert run["date"] and run["command"] and len(run["measured"]) == 4
    assert all(7.5 < row["bits_per_byte"] < 8.5 and row["memory_bytes"] > 0 for row in run["measured"])
    return
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
  assert rows and all(row["date"] and row["command"] and "error" not in row for row in rows)


@pytest.mark.slow
def test_how_fast_data_are_read():
  command = [sys.executable, "benchmarks/input_pipeline.py", "--seconds=0.1"]
  done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True, timeout=600)
  assert all(row["MB/s"] > 0 for row in json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_several_devices_learn_as_one(tmp_path):
  flag = "--xla_cpu_enable_fast_min_max=true"
  command = [sys.executable, "benchmarks/scaling.py", "--devices=2", "--seconds=0.1", f"--output={tmp_path / 'rows'}"]
  here = environment() | {"JAX_PLATFORMS": "cpu"}
  command += [f"--flags={flag}"]
  subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=True, timeout=900)
  rows = json.loads((tmp_path / "rows").read_text())
  meshes = [{axis: 2} for axis in ("data", "fsdp", "seq", "tensor")]
  assert [(row["flags"], row["mesh"]) for row in rows] == [(f, mesh) for f in ("", flag) for mesh in meshes]
  assert all(row["loss differs"] < 1e-4 and row["MB sent"] > 0 and row["s on wire"] > 0 for row in rows)
  assert all(row["resumed differs"] < 1e-5 for row in rows[:4])
