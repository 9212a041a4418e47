"""benchmarks/generate_speed.py and train_speed.py: what they time and say, and that a failure costs a row alone."""

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
import types

import pytest
from commands import ROOT, environment

from megabyte_jax import measured, roofline, tables
from megabyte_jax.config import Config, Level, MegabyteConfig

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
  assert all(part in found["table9:megabyte"].source for part in ("speed.json", "4,096 bytes", "H200", "2026-11-24"))
  monkeypatch.setattr(tables, "RESULTS", tmp_path)
  assert speed.paper_speed_up() == pytest.approx(132 / 93)


def test_a_peer_that_fails_costs_its_rows_and_no_more(monkeypatch, capsys):
  speed = module(monkeypatch, "generate_speed")
  broken = types.SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: no kernel image\n")
  monkeypatch.setattr(speed.subprocess, "run", lambda *_, **__: broken)
  assert speed.peer_rows() == []
  assert "MEGABYTE-pytorch could not be timed: ImportError: no kernel image" in capsys.readouterr().out


def test_one_batch_of_a_peer_that_fails_is_an_error_in_its_row(monkeypatch):
  """With a stand-in for PyTorch, which need not be installed."""
  speed = module(monkeypatch, "generate_speed")
  waited = []

  class Prime(tuple):
    def cpu(self):
      return self

  class Model:
    def generate(self, prime):
      if prime[0] == 8:
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
  assert [row["batch"] for row in rows] == [1, 8, 2] and len(waited) == 7
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


def test_every_case_but_the_longest_is_timed_by_default(monkeypatch, capsys):
  timed, speed = wanted(monkeypatch, capsys)
  cases = set(speed.cases()) - {"long", "tiny"}
  assert {name for name in timed if " " not in name} == cases | {"text24:dropout=0.1"}
  beside = {f"{case} {how}" for case in ("text24", "text14") for how in speed.PEERS}
  assert {name for name in timed if " " in name} == beside and "text24 mblm opened" in beside


def test_a_smoke_test_starts_no_peer(monkeypatch, capsys):
  assert wanted(monkeypatch, capsys, "--cases=tiny")[0] == ["tiny"]
  assert wanted(monkeypatch, capsys, "--cases=text14,tiny", "--peers=")[0] == ["text14", "tiny"]


def test_the_traffic_of_attention_logits_counts_where_they_are_written():
  """On a GPU cuDNN keeps them on the chip for spans of 64 slots and more, but not those of cross-patch attention."""

  def extra(patch_size, cross_patch):
    """What a float32 logit for each pair of slots adds to the local model's traffic."""
    fine = Level(patch_size=1, width=8, num_layers=1, num_heads=2, rotary=True, cross_patch=cross_patch)
    coarse = Level(patch_size=patch_size, width=8 * patch_size, num_layers=1, num_heads=2)
    config = Config(model=MegabyteConfig(context=16 * 192, levels=(coarse, fine)), batch_size=1, num_steps=1)
    other = dataclasses.replace(fine, num_heads=4)  # twice the logits, all else the same
    more = dataclasses.replace(config, model=dataclasses.replace(config.model, levels=(coarse, other)))
    return [roofline.memory_traffic(c, 1, 1, "eval", "gpu") for c in (more, config)]

  for patch_size, cross_patch in ((192, 0), (64, 0), (16, 0), (16, 16)):
    more, less = extra(patch_size, cross_patch)
    assert more == less
  for patch_size, cross_patch in ((192, 192), (48, 0), (48, 48)):
    more, less = extra(patch_size, cross_patch)
    assert more - less == 16 * 192 * 2 * 2 * 4 * (patch_size + cross_patch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate_speed", "train_speed"])
def test_the_smallest_size_runs_on_a_cpu(name):
  small = {"generate_speed": ["--size=tiny", "--bytes=128"], "train_speed": ["--cases=tiny", "--limit_seconds=0.2"]}
  command = [sys.executable, f"benchmarks/{name}.py", *small[name]]
  here = environment() | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=True, timeout=600)
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
  assert rows and all(row["date"] and row["command"] and "error" not in row for row in rows)
