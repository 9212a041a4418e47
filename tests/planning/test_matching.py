"""Compute matching: the solver, the analytic match of the paper's rows, and one measured match of tiny models."""

import statistics
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.config import Config, Level, MegabyteConfig, MeshConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.paper.rows_by_name import config_of
from megabyte_jax.planning import matching, step_time
from megabyte_jax.planning.step_time import TimedStep, time_ratios


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
    found = matching.match(config_of(f"table2:pg19_{name}"), lambda c: matching.flops_ratio(c, reference))
    assert found.layers == pytest.approx(layers, abs=1)
    assert found.ratio == pytest.approx(1, abs=0.03)
  assert found.override == f"--config.model.num_layers={found.layers}"


def test_a_model_matches_itself_at_either_level():
  config = config_of("table2:pg19_megabyte")
  for level, flag in ((0, "levels[0].num_layers=14"), (-1, "levels[1].num_layers=18")):
    found = matching.match(matching.with_layers(config, 3, level), lambda c: matching.flops_ratio(c, config), level)
    assert found.config == config and found.ratio == 1
    assert found.override == f"--config.model.{flag}"
  with pytest.raises(ConfigError, match="2 levels; take 0 to 1"):
    matching.match(config, lambda candidate: 1.0, 2)


def tiny():
  level = Level(patch_size=1, width=16, num_layers=1, num_heads=2)
  model = MegabyteConfig(context=16, levels=(level,), dropout=0.0)
  return Config(model=model, mesh=MeshConfig(data=-1), batch_size=8, num_steps=9)


@pytest.mark.slow
def test_time_is_measured():
  """That it runs; what it says depends on the machine."""
  steps = [TimedStep(tiny()) for _ in range(2)]
  assert steps[0].bytes == 8 * 16
  assert min(time_ratios(*steps, rounds=2, round_seconds=0, warmup_seconds=0)) > 0


class Pretended:
  """A step that costs `cost`, on a machine that becomes slower from call to call and stalls now and then."""

  clock = 0

  def __init__(self, cost):
    self.cost, self.bytes = cost, 2 * cost

  def seconds(self, steps):
    Pretended.clock += 1
    stalled = 30 if Pretended.clock % 11 == 0 else 1
    return steps * self.cost * 1.05**Pretended.clock * stalled


@pytest.mark.parametrize("cost", [1, 3])
def test_time_is_compared_side_by_side(cost):
  """Costs per byte are equal; measured one after the other, 20 rounds of 5% would make them differ by 2.6 times."""
  found = time_ratios(Pretended(cost), Pretended(2), rounds=20, round_seconds=0, warmup_seconds=0)
  assert statistics.median(found) == pytest.approx(1, abs=0.06)


def test_time_of_a_diverged_model_is_refused(monkeypatch):
  monkeypatch.setattr(step_time, "initial_state", lambda config, mesh: None)
  monkeypatch.setattr(step_time, "make_train_step", lambda config: lambda state, x: (state, {"nats": float("nan")}))
  with pytest.raises(ConfigError, match="loss is nan"):
    TimedStep(tiny())


def test_command_line():
  command = [sys.executable, "-m", "megabyte_jax", "matching"]
  configs = [
    "--reference=configs/paper/table2.py:pg19_megabyte",
    "--candidate=configs/paper/table2.py:pg19_transformer",
  ]
  shown = subprocess.run([*command, *configs], capture_output=True, text=True, check=True).stdout
  assert "<- closest" in shown and "--config.model.levels[0].num_layers=" in shown
  failed = subprocess.run([*command, configs[0]], capture_output=True, text=True, check=False)
  assert failed.returncode != 0 and failed.stderr.startswith("error: --candidate is missing")
