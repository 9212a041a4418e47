import json
import os
import pathlib
import sys

import jax
import pytest
from run_commands import ROOT

from megabyte_jax.checkpoints.exported import export_model
from megabyte_jax.config import Config, Level, MegabyteConfig
from megabyte_jax.models.build import initial_parameters

sys.path.insert(0, str(pathlib.Path(ROOT) / "benchmarks"))
import file_compression as benchmark


@pytest.mark.slow
def test_files_are_compressed_checked_and_compared(tmp_path, capsys):
  levels = (
    Level(patch_size=4, width=32, num_layers=1, num_heads=2),
    Level(patch_size=1, width=16, num_layers=1, num_heads=2),
  )
  config = Config(model=MegabyteConfig(context=64, levels=levels), batch_size=1, num_steps=1)
  export_model(str(tmp_path / "model"), config, initial_parameters(config.model, jax.random.key(0)), step=3)
  (tmp_path / "letter.txt").write_bytes(b"Dear Sir, " * 60)
  (tmp_path / "noise.bin").write_bytes(os.urandom(500))
  files = [str(tmp_path / name) for name in ("letter.txt", "noise.bin")]
  benchmark.main([*files, f"--workdir={tmp_path}/model", f"--output={tmp_path}/found.json"])
  found = json.loads((tmp_path / "found.json").read_text())
  assert found["step"] == 3 and [row["bytes"] for row in found["files"]] == [600, 500]
  letter, noise = (row["bits_per_byte"] for row in found["files"])
  assert letter["xz -9e"] < 2 < letter["model"] and noise["model"] > 8  # an untrained model compresses nothing
  table = capsys.readouterr().out
  assert "| letter.txt | 600 |" in table and f"**{min(letter.values()):.3f}**" in table
