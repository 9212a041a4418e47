"""benchmarks/comparisons.py from end to end on tiny models: it runs, goes on, and is read back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_commands import environment

from megabyte_jax.evaluation.windows import METHODS
from megabyte_jax.paper import measured

ROOT = Path(__file__).parents[2]
TINY = """
import dataclasses, importlib.util
spec = importlib.util.spec_from_file_location("small", "{root}/configs/small.py")
small = importlib.util.module_from_spec(spec); spec.loader.exec_module(small)
from megabyte_jax.config import Config

def get_config(row):
  config = Config.from_dict(small.get_config(row))
  levels = tuple(
    dataclasses.replace(l, width=8 * l.patch_size, num_layers=1, num_heads=2, head_dim=4, attention_window=0)
    for l in config.model.levels)
  model = dataclasses.replace(config.model, levels=levels, context=64)
  return dataclasses.replace(config, model=model, batch_size=2, num_steps=8).to_config_dict()
"""


@pytest.fixture
def command(tmp_path):
  """The start of a command on tiny corpora and tiny models; settings and more flags follow."""
  text = (ROOT / "README.md").read_bytes()
  for split in ("train", "validation", "test"):
    (tmp_path / "corpora/books" / split).mkdir(parents=True)
    (tmp_path / "corpora/books" / split / "a.txt").write_bytes(text[:2000])
  (tmp_path / "tiny.py").write_text(TINY.format(root=ROOT))

  def run(name, *more):
    start = [sys.executable, str(ROOT / "benchmarks/comparisons.py"), name, f"--data={tmp_path / 'corpora'}"]
    files = [f"--workdir={tmp_path / 'runs'}", f"--config_file={tmp_path / 'tiny.py'}", "--train_bytes=1024"]
    files.append(f"--compiled={tmp_path / 'cache'}")
    given = {flag.split("=")[0] for flag in more}
    files = [flag for flag in files if flag.split("=")[0] not in given]
    return subprocess.run([*start, *files, *more], capture_output=True, text=True, check=True, env=environment())

  return run


@pytest.mark.slow
def test_a_small_comparison(command, tmp_path):
  flags = [
    "--rates=1,3",
    "--match=flops",
    "--rows=megabyte|books_transformer",
    f"--output={tmp_path / 'out/books.json'}",
  ]
  plan = command("books", *flags, "--dry_run")
  assert "table2:books_transformer" in plan.stdout and not (tmp_path / "runs/books").exists()
  first = command("books", *flags)
  results = json.loads((tmp_path / "out/books.json").read_text())
  assert [row["row"] for row in results["rows"]] == ["table2:books_megabyte", "table2:books_transformer"]
  for row in results["rows"]:
    assert np.isfinite(row["bpb"]) and row["bytes"] == 2000 and row["word_perplexity"] > 1
    assert row["bytes_trained"] == 1024 and row["training_seconds"] > 0
    assert set(row["trials"]) == {"1.0", "3.0"}
  assert results["rows"][0]["matched"] is None and results["rows"][1]["matched"]["by"] == "flops"
  assert [set(row["methods"]) for row in results["rows"]] == [set(METHODS), {"basic", "sliding"}]
  for name in ("training", "by_context", "by_patch"):
    assert (tmp_path / f"out/books_{name}.png").read_bytes().startswith(b"\x89PNG")
  kept = json.loads((tmp_path / "out/books/table2.books_megabyte.json").read_text())["run"]
  assert kept["seed"] == 0 and kept["config"]["batch_size"] == 2 and len(kept["curve"]) > 0
  for method, positions in kept["positions"].items():
    assert np.isclose(kept["results"][method]["bpb"], results["rows"][0]["methods"][method])
    assert len(positions["patch"]) == 8 and len(positions["context"]) == 64
  shutil.rmtree(tmp_path / "runs")  # another machine goes on from the rows' files
  again = command("books", *flags)
  assert "$ python train.py" in first.stdout and "$ python" not in again.stdout
  assert json.loads((tmp_path / "out/books.json").read_text())["rows"] == results["rows"]
  with pytest.raises(subprocess.CalledProcessError) as error:
    command("books", *flags, "--test_bytes=77")
  assert "was made with other settings (saved -> given):\n  test_bytes: 0 -> 77\n" in error.value.stderr
  found = measured.from_results(tmp_path / "out", tmp_path)
  assert [entry.row for entry in found] == ["table2:books_megabyte", "table2:books_transformer"]
  assert found[0].numbers["bpb"] == results["rows"][0]["bpb"]


@pytest.mark.slow
def test_a_second_seed_takes_layers_and_learning_rates_from_the_first(command, tmp_path):
  first, second = (tmp_path / f"out/{name}.json" for name in ("first", "second"))
  flags = ["--rates=1,3", "--match=flops", "--rows=books_transformer", "--test_bytes=500"]
  command("books", *flags, f"--output={first}")
  like = [*flags, "--flags=--config.seed=1", f"--workdir={tmp_path / 'seed1'}"]
  printed = command("books", *like, f"--output={second}", f"--like={first.with_suffix('')}").stdout
  assert printed.count("$ python train.py") == 1  # no trials
  a, b = (json.loads(path.read_text())["rows"][0] for path in (first, second))
  assert (a["learning_rate"], a["matched"], a["note"]) == (b["learning_rate"], b["matched"], b["note"])
  assert len(a["trials"]) == 2 and b["trials"] == {} and a["bpb"] != b["bpb"]
  with pytest.raises(subprocess.CalledProcessError) as error:
    command("books", *like, f"--like={tmp_path}", f"--output={tmp_path / 'third.json'}")
  assert f"--like={tmp_path} has no finished table2.books_transformer.json; name the folder" in error.value.stderr


@pytest.mark.slow
def test_recipes_get_bytes_instead_of_layers_and_a_rate_that_breaks_down_is_out(command, tmp_path):
  flags = ["--rates=1,1e33", "--trial_share=0.5", "--test_bytes=500", r"--rows=megabyte$|modern$"]
  command("modern_books", *flags, "--match_rounds=2")
  paper, modern = json.loads((tmp_path / "runs/modern_books/results.json").read_text())["rows"]
  assert modern["row"] == "table2:books_megabyte+modern"
  assert modern["trials"]["1e+33"] is None and paper["learning_rate"] == modern["learning_rate"] == 2e-4
  assert modern["bytes"] == paper["bytes"] == 500 and "first 0.0005 MB of test" in paper["note"]
  assert modern["matched"]["by"] == "time" and modern["matched"]["flag"] == ""
  assert modern["bytes_trained"] == max(2, round(1024 / modern["matched"]["cost"] / 128)) * 128
  config = json.loads((tmp_path / "runs/modern_books/table2.books_megabyte+modern/run/config.json").read_text())
  assert config["model"]["activation"] == "swiglu" and config["optimizer"]["name"] == "muon"
