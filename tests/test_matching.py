"""Compute matching: the solver, the analytic match of the paper's rows, and one measured match of tiny models."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax import matching
from megabyte_jax.config import Config, Level, MegabyteConfig, MeshConfig
from megabyte_jax.config_parsing import ConfigError
from megabyte_jax.tables import config_of


@given(st.floats(0, 50), st.floats(0.01, 10), st.floats(0.5, 200), st.integers(1, 64))
@settings(deadline=None)
def test_solver_finds_the_nearest_and_looks_seldom(base, slope, answer, start):
  target, calls = base + slope * answer, []

  def cost(n):
    calls.append(n)
    return base + slope * n

  n, tried = matching.solve(cost, target, start)
  best = max(1, round(answer))
  assert abs(cost(n) - target) <= abs(cost(best) - target) + 1e-6
  assert len(tried) == len(calls) - 2  # the two above are this test's own
  assert len(tried) <= 8


@given(st.lists(st.floats(0.9, 1.1), min_size=200, max_size=200), st.floats(5, 100), st.integers(1, 64))
@settings(deadline=None)
def test_solver_ends_on_noisy_costs(noise, target, start):
  measured = {}

  def cost(n):
    return measured.setdefault(n, n * noise[n % 200])

  n, _ = matching.solve(cost, target, start)
  assert measured[n] == pytest.approx(target, rel=0.3)


def test_text_rows_of_the_paper_match_within_a_tenth():
  """The paper matched measured time; by FLOPs its baselines come out close to what it took (22 and 17 layers)."""
  reference = config_of("table2:pg19_megabyte")
  for name, layers in (("transformer", 24), ("perceiver_ar", 20)):
    found = matching.match(reference, config_of(f"table2:pg19_{name}"), matching.training_flops)
    assert found.layers == pytest.approx(layers, abs=1)
    assert found.ratio == pytest.approx(1, abs=0.03)
  assert found.override == f"--config.model.num_layers={found.layers}"


def test_a_model_matches_itself_at_either_level():
  config = config_of("table2:pg19_megabyte")
  for level, flag in ((0, "levels[0].num_layers=14"), (-1, "levels[1].num_layers=18")):
    found = matching.match(config, matching.with_layers(config, 3, level), matching.training_flops, level)
    assert found.config == config and found.ratio == 1
    assert found.override == f"--config.model.{flag}"
  with pytest.raises(ConfigError, match="2 levels; take 0 to 1"):
    matching.match(config, config, matching.training_flops, 2)


def tiny():
  level = Level(patch_size=1, width=16, num_layers=1, num_heads=2)
  model = MegabyteConfig(context=16, levels=(level,), dropout=0.0)
  return Config(model=model, mesh=MeshConfig(data=-1), batch_size=8, num_steps=9)


def test_time_is_measured():
  """That it runs; what it says depends on the machine."""
  assert 0 < matching.seconds_per_byte(tiny(), steps=2, warmup_seconds=0) < 10


def test_time_of_a_diverged_model_is_refused(monkeypatch):
  monkeypatch.setattr(matching, "initial_state", lambda config, mesh: None)
  monkeypatch.setattr(matching, "make_train_step", lambda config: lambda state, x: (state, {"nats": float("nan")}))
  with pytest.raises(ConfigError, match="loss is nan"):
    matching.seconds_per_byte(tiny(), steps=2, warmup_seconds=0)


def test_command_line():
  command = [sys.executable, "-m", "megabyte_jax.matching"]
  configs = [
    "--reference=configs/paper/table2.py:pg19_megabyte",
    "--candidate=configs/paper/table2.py:pg19_transformer",
  ]
  shown = subprocess.run([*command, *configs], capture_output=True, text=True, check=True).stdout
  assert "of the reference" in shown and "--config.model.levels[0].num_layers=" in shown
  failed = subprocess.run([*command, configs[0]], capture_output=True, text=True, check=False)
  assert failed.returncode != 0 and failed.stderr.startswith("error: --candidate is missing")
