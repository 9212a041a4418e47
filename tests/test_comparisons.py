"""benchmarks/comparisons.py from end to end on tiny models: it runs, goes on, and is read back."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import environment

from megabyte_jax import measured
from megabyte_jax.windows import METHODS

ROOT = Path(__file__).parent.parent
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


@pytest.mark.slow
def test_a_small_comparison(tmp_path):
  text = (ROOT / "README.md").read_bytes()
  for split in ("train", "validation", "test"):
    (tmp_path / "corpora/books" / split).mkdir(parents=True)
    (tmp_path / "corpora/books" / split / "a.txt").write_bytes(text[:2000])
  (tmp_path / "tiny.py").write_text(TINY.format(root=ROOT))
  command = [
    *(sys.executable, str(ROOT / "benchmarks/comparisons.py"), "books", f"--data={tmp_path / 'corpora'}"),
    *(
      f"--workdir={tmp_path / 'runs'}",
      f"--config_file={tmp_path / 'tiny.py'}",
      f"--output={tmp_path / 'out/books.json'}",
    ),
    *("--train_bytes=1024", "--rates=1,3", "--match=flops", "--rows=megabyte|books_transformer"),
  ]
  first = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(tmp_path / "cache"))
  results = json.loads((tmp_path / "out/books.json").read_text())
  assert [row["row"] for row in results["rows"]] == ["table2:books_megabyte", "table2:books_transformer"]
  for row in results["rows"]:
    assert np.isfinite(row["bpb"]) and row["bytes"] == 2000 and row["word_perplexity"] > 1
    assert row["bytes_trained"] == 1024
    assert set(row["trials"]) == {"1.0", "3.0"}
  assert [set(row["methods"]) for row in results["rows"]] == [set(METHODS), {"basic", "sliding"}]
  again = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(tmp_path / "cache"))
  assert "$ python train.py" in first.stdout and "$ python" not in again.stdout
  found = measured.from_results(tmp_path / "out", tmp_path)
  assert [entry.row for entry in found] == ["table2:books_megabyte", "table2:books_transformer"]
  assert found[0].numbers["bpb"] == results["rows"][0]["bpb"]
