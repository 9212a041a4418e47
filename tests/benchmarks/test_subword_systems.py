"""benchmarks/subword_systems.py: a system of subwords for a few steps, and the settings of all."""

import json
import math
import pathlib
import sys

import pytest
from run_commands import ROOT, write_data
from tokenizer_file import PIECES, tokenizer_file

from megabyte_jax.config import Config
from megabyte_jax.models.flops import flops_per_byte
from megabyte_jax.paper import measured, tables

sys.path.insert(0, str(ROOT / "benchmarks"))
import subword_systems as benchmark

SMALL = [
  "model.context=32",
  'model.levels=[{"patch_size": 1, "width": 16, "num_layers": 1, "num_heads": 2}]',
  'model.remat="none"',
  "batch_size=8",
  "accumulate=1",
  "eval.batch_size=64",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  folder = write_data(tmp_path_factory.mktemp("table3"))
  output = folder / "results" / "table3.json"
  arguments = [
    f"--train={folder / 'train.txt'}",
    f"--validation={folder / 'validation'}",
    "--flops=3e7",
    "--systems",
    "subword_transformer",
    f"--tokenizer={tokenizer_file()}",
    f"--workdir={folder / 'runs'}",
    f"--output={output}",
    "--changes=",
    "--set",
    *SMALL,
  ]
  benchmark.main(arguments)
  before = output.read_bytes()
  benchmark.main(arguments)  # nothing is left to do
  assert json.loads(output.read_bytes())["rows"] == json.loads(before)["rows"]
  return output


@pytest.mark.slow
def test_figures_are_of_the_texts_bytes(results):
  [entry] = json.loads(results.read_text())["rows"]
  assert entry["row"] == "table3:subword_transformer"
  assert entry["bytes"] == 1000 and entry["bytes_per_token"] > 1
  assert entry["word_perplexity"] == pytest.approx(math.exp(entry["bpb"] * 1000 * math.log(2) / entry["words"]))
  assert entry["bytes_per_second"] > 0
  steps, bits = zip(*entry["curve"], strict=True)
  assert steps[-1] == entry["config"]["num_steps"] and bits[-1] == entry["train_bpb"]
  assert entry["command"].startswith("python benchmarks/subword_systems.py --train=") and not entry["shared_device"]
  config = Config.from_dict(entry["config"])
  assert config.model.vocab_size == PIECES
  assert entry["trained_on"] == config.num_steps * 8 * 32


@pytest.mark.parametrize("changes", ["+modern", "+scaled", ""])
def test_all_systems_get_equal_flops(changes):
  arguments = benchmark.parse_arguments(
    ["--train=a", "--validation=b", "--flops=1e17", "--output=c", f"--changes={changes}"]
  )
  for name in arguments.systems:
    config = benchmark.make_config(name, arguments, tokenizer_file())
    per_token = flops_per_byte(config.model, attention="whole", training=True)
    spent = config.num_steps * config.bytes_per_step * per_token
    assert spent == pytest.approx(1e17, rel=1e-3), name
    assert config.data.form != "subwords" or config.model.vocab_size == PIECES


def test_a_system_that_a_signal_stopped_is_no_result(tmp_path, monkeypatch):
  monkeypatch.setattr(benchmark.train, "train", lambda config, workdir: False)
  flags = ["--train=a", "--validation=b", "--flops=1e12", f"--output={tmp_path / 'rows'}", "--systems=megabyte"]
  with pytest.raises(SystemExit, match="stopped; give the same command again"):
    benchmark.main(flags)
  assert not (tmp_path / "rows").exists()


@pytest.mark.slow
def test_tables_show_them_beside_the_papers(results):
  found = measured.from_results(results.parent, pathlib.Path(results.parent))
  rows = {row["row"]: row for row in tables.describe("3", found)["rows"]}
  [ours] = rows["subword transformer (not in the paper)"]["ours"]
  assert ours["source"] == "table3.json" and ours["perplexity_validation"] > 1
  assert "FLOP of training" in ours["note"]
