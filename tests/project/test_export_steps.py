"""The example that exports steps: what comes back computes what the package computes."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from run_commands import ROOT, environment

from megabyte_jax import Config, Level, MegabyteConfig, byte_nats, generate, load
from megabyte_jax.checkpoints.arrays import flat_arrays
from megabyte_jax.checkpoints.exported import export_model
from megabyte_jax.models.build import initial_parameters

LEVELS = (
  Level(patch_size=4, width=32, num_layers=1, num_heads=2),
  Level(patch_size=1, width=16, num_layers=1, num_heads=2),
)
CONFIG = Config(
  model=MegabyteConfig(context=32, levels=LEVELS, init_std=0.2, compute_dtype="float32"), batch_size=1, num_steps=1
)


def test_exported_steps_compute_what_the_package_computes(tmp_path):
  parameters = initial_parameters(CONFIG.model, jax.random.key(3))
  export_model(str(tmp_path / "model"), CONFIG, parameters, step=1)
  command = [sys.executable, "examples/export_steps.py", f"--workdir={tmp_path}/model", f"--out={tmp_path}/steps"]
  subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
  steps = {p.stem: export.deserialize(bytearray(p.read_bytes())) for p in pathlib.Path(tmp_path, "steps").iterdir()}
  assert set(steps) == {"eval", "prompt", "patch"} and steps["eval"].platforms == ("cpu", "cuda", "tpu")

  model, _, _ = load(str(tmp_path / "model"))
  text = np.frombuffer(b"The same bytes, twice: 32 bytes.", np.uint8)[None]
  named = flat_arrays(parameters)
  np.testing.assert_allclose(steps["eval"].call(named, text), byte_nats(model, jnp.asarray(text))[0], rtol=1e-5)

  known, seed = 6, 5
  wanted = generate(model, text[0, :known].tobytes(), 26, seed=seed).bytes_[0]
  x_BT = jnp.where(jnp.arange(32) < known, text.astype(np.int32), 0)
  state = steps["prompt"].call(named, x_BT, jnp.int32(known))
  made = []
  for _ in range(4, 32, 4):  # the prompt's first patch is whole
    state, bytes_BS = steps["patch"].call(named, state, x_BT, jnp.int32(known), jnp.uint32(seed))
    made += np.asarray(bytes_BS)[0].tolist()
  assert bytes(made[known - 4 :]) == wanted.tobytes()
