"""Training of recurrent models: memories in the state, in checkpoints, over parts of a batch and over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

import train
from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  TransformerXLConfig,
)
from megabyte_jax.data.batches import draw_batches, open_windows
from megabyte_jax.data.open_data import open_source
from megabyte_jax.display.metrics import Metrics
from megabyte_jax.models import build
from megabyte_jax.models.transformer_xl import TransformerXL
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh
from megabyte_jax.training.resume import restored_state
from megabyte_jax.training.state import abstract_state, initial_state, make_train_step
from megabyte_jax.training.step_metrics import StepMetrics

CONFIG = Config(
  model=TransformerXLConfig(context=4, width=16, num_layers=1, num_heads=4, memory_length=6, dropout=0.1),
  optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0),
  checkpoint=CheckpointConfig(every_steps=2),
  batch_size=16,
  num_steps=4,
  log_every=1,
)
ONE = make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  for i, length in enumerate((150, 7, 90, 40, 3, 200)):
    text = np.random.default_rng(i).integers(97, 105, length).astype(np.uint8)
    (folder / f"{i}.txt").write_bytes(text.tobytes())
  return DataConfig(train=str(folder), validation="")


def steps(config, mesh, number):
  """The state and the metrics after so many steps, from the beginning."""
  windows = open_windows(
    open_source(config.data, "train"), context=4, seed=config.seed, consecutive_rows=config.batch_size
  )
  step, metrics = make_train_step(config), []
  with jax.set_mesh(mesh):
    state = initial_state(config, mesh)
    for _, batch in draw_batches(windows, batch_size=16, num_steps=number, sharding=batch_sharding(mesh)):
      state, values = step(state, *batch)
      metrics.append(jax.tree.map(float, values))
  return state, metrics


@pytest.fixture(scope="module")
def without_dropout(data):
  config = dataclasses.replace(CONFIG, data=data, model=dataclasses.replace(CONFIG.model, dropout=0.0))
  return config, *steps(config, ONE, 4)


def assert_close(state, expected):
  close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-4)
  jax.tree.map(close, state.memory, expected.memory)
  jax.tree.map(close, state.parameters, expected.parameters)


def test_resuming_is_bitwise_exact(data, tmp_path):
  config = dataclasses.replace(CONFIG, data=data)
  train.train(config, str(tmp_path / "whole"))
  train.train(dataclasses.replace(config, num_steps=2), str(tmp_path / "parts"))
  train.train(config, str(tmp_path / "parts"))
  states = []
  for name in ("whole", "parts"):
    with Checkpoints(tmp_path / name, read_only=True) as checkpoints:
      states.append(restored_state(config, ONE, checkpoints, 4))
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert states[0].memory.inputs_BLMD.any() and states[0].memory.filled_B.max() == 6


@pytest.mark.slow
def test_over_devices_and_in_parts_it_is_the_same(without_dropout):
  config, expected, metrics = without_dropout
  config = dataclasses.replace(config, accumulate=2)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
  state, found = steps(config, mesh, 4)
  assert_close(state, expected)
  for a, b in zip(found, metrics, strict=True):
    assert a["bytes"] == b["bytes"] and a["extra_loss"] == 0
    assert a["nats"] == pytest.approx(b["nats"], rel=1e-4)
  assert state.memory.inputs_BLMD.sharding.spec[0] == ("data", "fsdp")
  assert state.memory.filled_B.dtype == np.int32 and state.memory.filled_B.tolist() == expected.memory.filled_B.tolist()


def test_the_memory_is_of_the_rows_own_documents(without_dropout):
  """The third step's nats are those of segments read one after the other, by parameters that do not change."""
  config, *_ = without_dropout
  still = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-30))
  state, metrics = steps(still, ONE, 3)
  windows = open_windows(open_source(config.data, "train"), context=4, seed=0, consecutive_rows=16)
  model = build.trained_model(config.model, state.parameters)
  read = jax.jit(model.segment_nats)
  total = 0.0
  for row in range(16):
    segments = [windows.segment_of(step, row) for step in range(3)]
    first = max(i for i, segment in enumerate(segments) if segment.fresh)
    memory = model.empty_memory(1)
    for segment in segments[first:]:
      x_T = np.zeros(4, np.uint8)
      windows.read((segments.index(segment)) * 16 + row, x_T)
      nats_BT, _, memory, _ = read(memory, x_T[None], length_B=jnp.array([segment.length]))
    total += float(nats_BT.sum())
  assert metrics[2]["nats"] == pytest.approx(total, rel=1e-4)


class WithALossOfItsOwn(TransformerXL):
  """Adds three times the squares of the pad to each row's loss."""

  def segment_outputs(self, memory, x_BT, **options):
    h_BTD, memory, _ = super().segment_outputs(memory, x_BT, **options)
    return h_BTD, memory, 3 * len(x_BT) * jnp.sum(self.embedder.pad[...] ** 2)


def test_a_loss_of_the_familys_own_is_trained_on_and_reported(without_dropout, monkeypatch, tmp_path):
  config, _, plain = without_dropout
  monkeypatch.setitem(build.FAMILIES, TransformerXLConfig, WithALossOfItsOwn)
  config = dataclasses.replace(config, batch_size=16, accumulate=2)
  _, metrics = steps(config, ONE, 1)
  assert metrics[0]["nats"] == pytest.approx(plain[0]["nats"], rel=1e-5)
  with jax.set_mesh(ONE):
    before = initial_state(config, ONE).parameters["embedder"]["pad"]
  assert metrics[0]["extra_loss"] == pytest.approx(48 * float(jnp.sum(before**2)), rel=1e-5)
  assert metrics[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-6)
  with Metrics(tmp_path, num_steps=4, bytes_per_step=64, tensorboard=False) as log:
    reader = StepMetrics(config, log, checkpoints=None, first_step=0)
    reader.put(1, metrics[0])
    reader.read()
  extra = metrics[0]["extra_loss"] / metrics[0]["bytes"]
  assert f'"extra_loss": {extra}' in (tmp_path / "metrics.jsonl").read_text()


def test_other_families_have_no_memory_in_their_state():
  state = abstract_state(Config.from_dict(tiny_config.get_config()), ONE)
  assert state.memory == () and state.beside_parameters is state.opt_state


def test_an_empty_memory_is_left_out_of_checkpoints_and_made_anew():
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, memory_length=0))
  abstract = abstract_state(config, ONE)
  state = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), abstract)
  kept = state.beside_parameters
  assert all(leaf.size for leaf in jax.tree.leaves(kept)) and len(jax.tree.leaves(kept["memory"])) == 2
  again = abstract._replace(step=state.step, parameters=state.parameters).with_beside_parameters(kept)
  jax.tree.map(np.testing.assert_array_equal, again, state)
