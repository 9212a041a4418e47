"""Checkpoints of every format that was ever written are still read.

tests/checkpoints/format_N.tar.gz is the work directory of a tiny run, as `train.py` left it when N was the newest
format. A change of what is written raises `checkpoints.FORMAT`, and adds the next file here; none is ever replaced.
"""

import pathlib
import tarfile

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from megabyte_jax.checkpoints import checkpoints
from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.saved_config import check_same_run
from megabyte_jax.checkpoints.trained_model import load
from megabyte_jax.config import MeshConfig
from megabyte_jax.data.open_data import open_source
from megabyte_jax.evaluation.evaluate import make_eval_step
from megabyte_jax.parallel.sharding import make_mesh
from megabyte_jax.training.state import abstract_state

SAVED = sorted(pathlib.Path(__file__).parent.glob("format_*.tar.gz"))
# What the code that wrote the file gave: the norm of the parameters, nats of the training text's first 16 bytes, and
# the norm of the optimizer's moments.
NUMBERS = {"format_1": (8.563139, 87.272026, 0.274183)}


@pytest.fixture(params=SAVED, ids=lambda path: path.name)
def workdir(request, tmp_path):
  with tarfile.open(request.param) as archive:
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
    archive.extractall(tmp_path, **safely)
  [folder] = tmp_path.iterdir()
  return folder


def test_there_is_one_of_every_format():
  assert [path.name for path in SAVED] == [f"format_{i}.tar.gz" for i in range(1, checkpoints.FORMAT + 1)]


def test_an_old_checkpoint_predicts_what_it_did(workdir):
  model, config, step = load(workdir)
  parameters = nnx.to_pure_dict(nnx.state(model))
  x_BT = open_source(config.data, "train").read(0, 0, 16)[None]
  nats = float(np.sum(make_eval_step(config)(parameters, x_BT, np.full(1, 16, np.int32))))
  assert step == 6
  np.testing.assert_allclose((float(optax.tree.norm(parameters)), nats), NUMBERS[workdir.name][:2], rtol=1e-5)


def test_an_old_run_goes_on(workdir):
  """The same config continues it, with its optimizer's state."""
  _, config, _ = load(workdir)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  abstract = abstract_state(config, mesh)
  source = open_source(config.data, "train")
  with Checkpoints(workdir) as checkpoints:
    meta = checkpoints.meta()
    assert meta["format"] == int(workdir.name.partition("_")[2])
    check_same_run(meta, config.to_dict(), source.fingerprint)
    restored = checkpoints.restore(abstract.parameters, abstract.opt_state)
  norm = float(optax.tree.norm([leaf for leaf in jax.tree.leaves(restored.opt_state) if leaf.ndim]))
  np.testing.assert_allclose(norm, NUMBERS[workdir.name][2], rtol=1e-5)
