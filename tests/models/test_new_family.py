"""A family of models that the package does not know, added through what CONTRIBUTING.md names: a config and a model.

It is a bigram model: the logits of a byte are a row of a table, chosen by the byte before. Everything else asks its
config or the model, so that training, evaluation, generation, compression and planning need to know nothing of it.
"""

import ast
import dataclasses
import itertools
import pathlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megabyte_jax
from megabyte_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from megabyte_jax.evaluation.evaluate import evaluate
from megabyte_jax.generation import entropy_coding
from megabyte_jax.generation.sampling import Sampling, generate
from megabyte_jax.models import build
from megabyte_jax.models.family import Model
from megabyte_jax.models.parameters import make_parameter
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh
from megabyte_jax.planning.lowering import lower
from megabyte_jax.training.state import initial_state, make_train_step

TEXT = b"abracadabra, abracadabra! " * 8


class Documents:
  """One text in memory."""

  slow, joinable, unit, skipped, fingerprint, names = False, True, 1, 0, "", ["text"]
  lengths = np.array([len(TEXT)])

  def read(self, document, start, stop):
    return np.frombuffer(TEXT, np.uint8)[start:stop]


# --- What a new config class holds. ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigramConfig(ModelConfig):
  family: Literal["bigram"] = "bigram"
  levels = ()
  spans = ()
  display_name = "Bigram"

  def __post_init__(self):
    self.check_sizes()

  def with_levels(self, levels):
    assert not levels
    return self

  def parameter_count(self):
    return (self.vocab_size + 1) * self.vocab_size

  def flops_breakdown(self, attention):
    return {"head": 0.0}


# --- What a new file in models/ holds. ---


class State(NamedTuple):
  byte_B: jax.Array  # vocab_size before the first byte
  position: jax.Array


class Bigram(Model):
  def __init__(self, config, rngs):
    self.config = config
    self.table = make_parameter("table", {"before": config.vocab_size + 1, "vocab": config.vocab_size}, config, rngs)

  def __call__(self, x_BT, *, dropout_key=None):
    before_BT = jnp.pad(x_BT[:, :-1].astype(jnp.int32), ((0, 0), (1, 0)), constant_values=self.config.vocab_size)
    return self.table[...].astype(jnp.float32)[before_BT]

  def read_prompt(self, x_BT, length, latent_start=0):
    before_B = jax.lax.dynamic_index_in_dim(x_BT, jnp.maximum(length - 1, 0), 1, keepdims=False)
    return State(jnp.where(length == 0, self.config.vocab_size, before_B), jnp.int32(length))

  def decode_patch(self, state, pick):
    after, logits_BV = self.decode_byte(state, state.byte_B)
    byte_B = pick(logits_BV, state.position)
    return after._replace(byte_B=byte_B), byte_B[:, None], logits_BV[:, None]

  def start_bytes(self, batch):
    return State(jnp.full(batch, self.config.vocab_size), jnp.int32(0))

  def decode_byte(self, state, previous_B, first_level=0):
    before_B = jnp.where(state.position == 0, self.config.vocab_size, previous_B)
    return State(before_B, state.position + 1), self.table[...].astype(jnp.float32)[before_B]


# --- What the rest of the package does with them. ---

CONFIG = Config(
  model=BigramConfig(context=32, init_std=0.02),
  optimizer=OptimizerConfig(learning_rate=0.3, warmup_steps=1),
  batch_size=4,
  num_steps=40,
)


@pytest.fixture(scope="module")
def trained():
  """Parameters after a short training on two devices."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(build.FAMILIES, BigramConfig, Bigram)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    starts = np.random.default_rng(0).integers(0, len(TEXT) - 32, (CONFIG.num_steps, 4))
    with jax.set_mesh(mesh):
      state, step = initial_state(CONFIG, mesh), make_train_step(CONFIG)
      for start_B in starts:
        x_BT = np.stack([np.frombuffer(TEXT, np.uint8)[s : s + 32] for s in start_B])
        state, values = step(state, jax.device_put(x_BT, batch_sharding(mesh)))
    yield jax.tree.map(np.asarray, state.parameters)


def counts():
  """log2 p of every byte of TEXT by its smoothed bigrams, for comparison: what such a model can learn at best."""
  pairs = list(itertools.pairwise(TEXT))
  return -np.mean([np.log2(pairs.count(pair) / TEXT[:-1].count(pair[0])) for pair in pairs])


def test_its_config_is_read_and_written():
  again = Config.from_dict(CONFIG.to_dict())
  assert again == CONFIG and type(again.model) is BigramConfig


def test_it_is_trained_evaluated_sampled_and_compressed_with(trained):
  one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  result = evaluate(CONFIG, trained, Documents(), mesh=one, method="sliding")
  assert result.bytes == len(TEXT) and counts() < result.bpb < counts() + 1 < 8
  model = build.trained_model(CONFIG.model, jax.tree.map(jnp.asarray, trained))
  made = generate(model, b"abr", 40, num_samples=2, sampling=Sampling(temperature=0)).bytes_
  assert made[0].tobytes().startswith(b"a") and set(made[0].tobytes()) <= set(TEXT)
  text = np.frombuffer(TEXT, np.uint8)
  code = entropy_coding.encode(model, text, 2)
  np.testing.assert_array_equal(entropy_coding.decode(model, code, len(text), 2), text)
  assert 8 * len(code) < 4 * len(TEXT)


def test_it_is_counted_declared_and_lowered(trained):
  assert CONFIG.model.parameter_count() == sum(leaf.size for leaf in jax.tree.leaves(trained))
  assert build.parameter_info(CONFIG.model)["table"].kind == "table"
  mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
  for step in ("train", "eval", "generate"):
    assert lower(CONFIG, mesh, step).as_text()


def test_other_rooms_ask_the_config_and_not_its_class():
  """Only the families' own files, their lists and the rows of the paper name a family's classes."""
  root = pathlib.Path(megabyte_jax.__file__).parent
  configs = {config.__name__ for config in build.FAMILIES if config is not BigramConfig}
  names = configs | {family.__name__ for family in build.FAMILIES.values() if family is not Bigram}
  own = {"__init__.py", "paper/rows.py", "paper/subword_rows.py"}
  for path in root.rglob("*.py"):
    place = path.relative_to(root).as_posix()
    if place in own or place.split("/")[0] in ("config", "models"):
      continue
    tree = ast.parse(path.read_text())
    used = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree)}
    assert not used & names, f"{place} names {sorted(used & names)}; ask config/model.py or models/family.py"
  isinstance_calls = [
    path.name
    for path in (root / "models").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call)
    and getattr(node.func, "id", "") == "isinstance"
    and {getattr(n, "id", "") for n in ast.walk(node)} & names
  ]
  assert not isinstance_calls
