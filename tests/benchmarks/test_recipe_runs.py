"""A run by a recipe: what its file says, and that it takes the windows that the config asks for."""

import json
import sys

import numpy as np
import pytest
from run_commands import ROOT

from megabyte_jax.config import Config, DataConfig
from megabyte_jax.data.open_data import open_source
from megabyte_jax.errors import ConfigError

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


@pytest.mark.parametrize("sizes", [{"context": 64}, {"context": 192, "latents": 64}], ids=["transformer", "perceiver"])
def test_a_step_has_the_documents_that_whole_windows_have(tmp_path, sizes):
  for number in range(5):
    (tmp_path / f"{number}.bin").write_bytes(np.random.default_rng(number).bytes(192))
  source = open_source(DataConfig(train=str(tmp_path), documents="whole"), "train")

  def places(name, sizes, batch_size, documents_per_step):
    values = recipe_runs.named_config(name)
    values["model"].update(sizes)
    values["data"]["documents"] = "whole"
    config = Config.from_dict({**values, "batch_size": batch_size})
    windows = recipe_runs.windows_for(source, config, documents_per_step)
    return [windows.place_of(draw) for draw in range(5 * batch_size)]

  whole = [place.document for place in places("windowed:64x1", {"context": 192}, 2, 0)]
  parts = places("perceiver:64x1" if "latents" in sizes else "transformer:64x1", sizes, 6, 2)
  assert [place.document for place in parts] == [document for document in whole for _ in range(3)]
  assert sorted(whole) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
  ends = [tuple(place.start + place.length for place in parts[first : first + 3]) for first in range(0, 30, 3)]
  assert all(len(set(found)) == 3 for found in ends) and len(set(ends)) > 1
  assert {end for found in ends for end in found} == set(range(64, 193, 32 if "latents" in sizes else 64))


def test_documents_of_a_step_must_be_equally_long(run):
  with pytest.raises(ConfigError, match="equally long"):
    run(flags=["--documents_per_step=4"])


def test_documents_of_a_step_are_not_of_weighted_sources(tmp_path):
  for name in ("a.bin", "b.bin"):
    (tmp_path / name).write_bytes(bytes(192))
  source = open_source(DataConfig(train=f"{tmp_path}/a.bin,{tmp_path}/b.bin", train_weights=(1.0, 2.0)), "train")
  config = Config.from_dict(recipe_runs.named_config("transformer:64x1"))
  with pytest.raises(ConfigError, match="train_weights"):
    recipe_runs.windows_for(source, config, 2)


def test_documents_of_a_step_share_out_the_batch(tmp_path):
  (tmp_path / "one.bin").write_bytes(bytes(192))
  source = open_source(DataConfig(train=str(tmp_path)), "train")
  values = recipe_runs.named_config("transformer:64x1")
  values["model"]["context"] = 64
  for batch_size, documents in ((6, 4), (6, 8), (8, 2)):  # not a whole number of windows, none, more than there are
    with pytest.raises(ConfigError, match="has 3 windows"):
      recipe_runs.FewDocuments(source, Config.from_dict({**values, "batch_size": batch_size}), documents)
