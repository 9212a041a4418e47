"""benchmarks/repeats.py: its windows are repeats, in step with patches where they should be, and it runs."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from run_commands import ROOT, environment


def test_windows_repeat_a_random_string_of_the_wanted_lengths(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  repeats = importlib.import_module("repeats")
  for multiple in (1, repeats.PATCH):
    random, found = np.random.default_rng(0), set()
    for _ in range(30):
      for row in repeats.windows(random, multiple):
        lengths = range(repeats.SHORTEST, repeats.LONGEST + 1)
        period = next(n for n in lengths if (row[n:] == row[:-n]).all())
        found.add(period)
        assert np.ptp(row) < repeats.LETTERS and len(set(row[:period])) > 6
    assert found == set(range(repeats.SHORTEST, repeats.LONGEST + 1, multiple))


@pytest.mark.slow
def test_it_runs_and_draws(tmp_path):
  command = [sys.executable, "benchmarks/repeats.py", "--steps=60", f"--output={tmp_path / 'out.json'}"]
  subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True, timeout=600)
  curves = json.loads((tmp_path / "out.json").read_text())["curves"]
  assert len(curves) == 3 and all(len(bits) == 2 and 3.5 < bits[1] < bits[0] < 8.5 for bits in curves.values())
  assert (tmp_path / "out.png").stat().st_size
