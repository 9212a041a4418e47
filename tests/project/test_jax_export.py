"""examples/jax_export.py: exported programs compute what the package computes, in a process that does not import it."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from run_commands import ROOT, environment, write_data

import train
from megabyte_jax import Sampling, byte_nats, generate, load
from megabyte_jax.config import Config, DataConfig

pytest.importorskip("flatbuffers")  # which jax.export needs to write programs
EXAMPLE = ROOT / "examples" / "jax_export.py"
RUN = """
import importlib.util, json, pathlib, sys
spec = importlib.util.spec_from_file_location("jax_export", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
results = [module.run(pathlib.Path(sys.argv[2]), text.encode(), 15) for text in ("It is a", "It was so")]
assert module.run(pathlib.Path(sys.argv[2]), b"It is a", 15, seed=1)[1] != results[0][1]
assert not [name for name in sys.modules if name.startswith("megabyte_jax")]
print(json.dumps([(bits, list(made)) for bits, made in results]))
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = write_data(tmp_path_factory.mktemp("export"))
  config = Config.from_dict(tiny_config.get_config())
  config = dataclasses.replace(config, data=DataConfig(train=str(folder / "train.txt"), validation=""))
  train.train(config, str(folder / "run"))
  return folder / "run"


@pytest.mark.slow
def test_exported_programs_are_the_model(workdir, tmp_path):
  spec = importlib.util.spec_from_file_location("jax_export", EXAMPLE)
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  example.write(str(workdir), tmp_path / "programs")
  command = [sys.executable, "-c", RUN, str(EXAMPLE), str(tmp_path / "programs")]
  result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  model, config, _ = load(str(workdir))
  for (bits, made), text in zip(json.loads(result.stdout), (b"It is a", b"It was so"), strict=True):
    x_BT = np.zeros((1, config.model.context), np.int32)
    x_BT[0, : len(text)] = np.frombuffer(text, np.uint8)
    nats = np.asarray(byte_nats(model, jnp.asarray(x_BT))[0])[0, : len(text)]
    assert bits == pytest.approx(nats.sum() / np.log(2) / len(text), rel=1e-4)
    expected = generate(model, text, 15, sampling=Sampling(temperature=0))
    assert made == expected.bytes_[0].tolist()
