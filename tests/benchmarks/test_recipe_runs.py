"""A run by a recipe: what its file says, and that it takes the windows that the config asks for."""

import json
import sys

import pytest
from run_commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import recipe_runs


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Trains a tiny model for four steps on short documents; returns the row."""
  (tmp_path / "texts").mkdir()
  for number in range(40):
    (tmp_path / "texts" / f"{number}.txt").write_bytes(bytes([97 + number % 4]) * (number + 1))

  def run(*changes, flags=()):
    data = f"--train={tmp_path}/texts", f"--validation={tmp_path}/texts", "--bytes=2048"
    settings = "--set", "batch_size=8", "model.context=64", *changes
    output = tmp_path / "row.json"
    arguments = ["megabyte:4:64x1:64x1+modern", *data, "--diagnose=2", f"--output={output}", *flags, *settings]
    monkeypatch.setattr(sys, "argv", ["recipe_runs.py", *arguments])
    recipe_runs.main()
    return json.loads(output.read_text())

  return run


def test_several_methods_score_the_same_bytes(run):
  row = run(flags=["--methods", "sliding", "basic"])
  assert list(row["bpb_by_method"]) == ["sliding", "basic"] and row["validation_bpb"] == row["bpb_by_method"]["sliding"]
  assert row["bpb_by_method"]["basic"] == run()["validation_bpb"]


def test_the_file_has_what_was_trained_and_scored(run):
  row = run()
  assert row["train_bytes"] == 4 * 8 * 64 and row["config"]["num_steps"] == 4
  assert row["validation_bytes"] == row["corpus_bytes"] == sum(range(1, 41))
  assert [found["step"] for found in row["diagnoses"]] == [1, 2, 4] and [point[0] for point in row["curve"]] == [4]
  whole = run('data.documents="whole"')
  assert whole["curve"][0][1] != row["curve"][0][1]  # windows of one document each
