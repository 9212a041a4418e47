"""Training, evaluation, generation and compression drive every recurrent family, knowing none of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megabyte_jax.config import BlockRecurrentConfig, CompressiveTransformerConfig, Config, MeshConfig, OptimizerConfig
from megabyte_jax.data.batches import draw_batches, open_windows
from megabyte_jax.evaluation.evaluate import evaluate
from megabyte_jax.generation import entropy_coding
from megabyte_jax.generation.sampling import generate
from megabyte_jax.models.build import trained_model
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh
from megabyte_jax.planning.lowering import lower
from megabyte_jax.training.state import initial_state, make_train_step

SIZES = {"context": 4, "vocab_size": 8, "width": 16, "num_layers": 1, "num_heads": 4, "dropout": 0.1, "init_std": 0.3}
MODELS = {
  "block_recurrent": BlockRecurrentConfig(**SIZES, window=2, states=3, recurrent_layers=(0,)),
  "compressive_transformer": CompressiveTransformerConfig(**SIZES, memory_length=4, compressed_length=3),
}
STEPS = 4


class Documents:
  """A sequence that only a memory of more than a segment foretells, in five documents."""

  slow, joinable, unit, skipped, fingerprint = False, True, 1, 0, ""
  lengths = np.array([23, 17, 4, 30, 19])
  names = tuple("abcde")

  def read(self, document, start, stop):
    return np.random.default_rng(document).integers(0, 8, self.lengths[document]).astype(np.uint8)[start:stop]


@pytest.mark.parametrize("name", [pytest.param("block_recurrent", marks=pytest.mark.slow), "compressive_transformer"])
def test_it_is_trained_evaluated_sampled_compressed_with_and_lowered(name):
  optimizer = OptimizerConfig(name="muon", learning_rate=1e-3, schedule="constant", warmup_steps=0)
  config = Config(model=MODELS[name], optimizer=optimizer, batch_size=4, accumulate=2, num_steps=STEPS)
  mesh, metrics = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]), []
  windows = open_windows(Documents(), context=4, seed=0, consecutive_rows=4)
  with jax.set_mesh(mesh):
    state, step = initial_state(config, mesh), make_train_step(config)
    for _, batch in draw_batches(windows, batch_size=4, num_steps=STEPS, sharding=batch_sharding(mesh)):
      state, values = step(state, *batch)
      metrics.append(jax.tree.map(float, values))
  losses = [values["extra_loss"] for values in metrics]
  assert losses == [0] * STEPS if name == "block_recurrent" else losses[0] == 0 < losses[-1]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  assert {leaf.addressable_shards[1].data.shape[0] for leaf in jax.tree.leaves(state.memory)} == {2}  # of 4 rows

  parameters = jax.tree.map(np.asarray, state.parameters)
  model = trained_model(config.model, jax.tree.map(jnp.asarray, parameters))
  read = jax.jit(model.segment_nats)

  @functools.cache
  def nats_of(text):
    memory, nats = model.empty_memory(1), []
    for start in range(0, len(text), 4):
      piece = np.frombuffer(text[start : start + 4].ljust(4, b"\0"), np.uint8)
      nats_BT, _, memory, _ = read(memory, piece[None], length_B=jnp.array([min(4, len(text) - start)]))
      nats.append(nats_BT[0])
    return np.concatenate(nats)[: len(text)]

  one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  result = evaluate(config, parameters, Documents(), mesh=one)
  texts = [Documents().read(document, 0, 99).tobytes() for document in range(5)]
  assert result.bytes == sum(map(len, texts))
  np.testing.assert_allclose(result.document_nats, [nats_of(text).sum() for text in texts], rtol=1e-4)
  made = generate(model, texts[0][:5], 13, num_samples=2, seed=1)
  for row, nats in zip(made.bytes_, made.nats, strict=True):
    np.testing.assert_allclose(nats, nats_of(texts[0][:5] + row.tobytes())[5:], rtol=1e-3, atol=1e-4)
  text = np.frombuffer(texts[3], np.uint8)
  code = entropy_coding.encode(model, text, 1)
  np.testing.assert_array_equal(entropy_coding.decode(model, code, len(text), 1), text)
  assert lower(config, mesh, "train").as_text()
