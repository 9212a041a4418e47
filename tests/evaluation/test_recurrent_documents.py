"""Recurrent models read whole documents, in evaluation, generation and compression, as their segments have them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megabyte_jax.config import Config, ConfigError, EvalConfig, MeshConfig, TransformerXLConfig
from megabyte_jax.evaluation.evaluate import _rows_at_once, evaluate
from megabyte_jax.evaluation.lanes import one_after_the_other, side_by_side
from megabyte_jax.evaluation.windows import check_method
from megabyte_jax.generation import entropy_coding
from megabyte_jax.generation.sampling import Sampling, generate
from megabyte_jax.models.build import initial_parameters, trained_model
from megabyte_jax.parallel.sharding import make_mesh
from megabyte_jax.planning.lowering import lower

CONFIG = Config(
  model=TransformerXLConfig(
    context=4, vocab_size=8, width=16, num_layers=1, num_heads=4, memory_length=6, init_std=0.5
  ),
  batch_size=2,
  num_steps=1,
  eval=EvalConfig(batch_size=2),
)


class Documents:
  """Random bytes below 8."""

  slow, joinable, unit, skipped, fingerprint = False, True, 1, 0, ""
  lengths = np.array([9, 0, 17, 4, 1, 6])
  names = ("a", "b", "c", "d", "e", "f")

  def read(self, document, start, stop):
    return np.random.default_rng(document).integers(0, 8, self.lengths[document]).astype(np.uint8)[start:stop]

  def whole(self, document):
    return self.read(document, 0, int(self.lengths[document]))


@pytest.fixture(scope="module")
def parameters():
  return jax.jit(functools.partial(initial_parameters, CONFIG.model))(jax.random.key(0))


@pytest.mark.parametrize(("at_once", "rows"), [(2, 2), (32, 5)])
def test_a_row_is_a_document(at_once, rows):
  """Rows without one cost as much, and five of the six documents have bytes."""
  config = dataclasses.replace(CONFIG, eval=EvalConfig(batch_size=at_once))
  assert _rows_at_once(Documents.lengths, config, "basic", 0) == rows


@pytest.fixture(scope="module")
def model(parameters):
  return trained_model(CONFIG.model, parameters)


@pytest.fixture(scope="module")
def nats_of(model):
  """The nats of each byte of a text, read segment after segment."""
  read = jax.jit(model.segment_nats)

  def nats(text):
    memory, parts = model.empty_memory(1), []
    for start in range(0, len(text), 4):
      x_T = np.zeros(4, np.uint8)
      x_T[: len(text) - start] = text[start : start + 4]
      nats_BT, _, memory, _ = read(memory, x_T[None], length_B=jnp.array([min(4, len(text) - start)]))
      parts.append(np.asarray(nats_BT[0]))
    return np.concatenate(parts)[: len(text)]

  return nats


@pytest.mark.parametrize("devices", [1, 4])
def test_every_byte_of_every_document_is_scored_once_with_its_own_memory(parameters, nats_of, devices):
  mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:devices])
  source, found = Documents(), {}

  def put(document, start, nats, weights):
    assert weights.all()
    for i, value in enumerate(nats):
      assert (document, start + i) not in found
      found[document, start + i] = value

  result = evaluate(CONFIG, parameters, source, mesh=mesh, on_byte_nats=put)
  assert result.bytes == result.bytes_read == 37 == len(found)
  for document, length in enumerate(source.lengths):
    expected = nats_of(source.whole(document)) if length else np.zeros(0)
    np.testing.assert_allclose([found[document, i] for i in range(length)], expected, rtol=1e-4, atol=1e-5)
    assert result.document_nats[document] == pytest.approx(expected.sum(), rel=1e-4)
  if devices == 1:
    first = evaluate(CONFIG, parameters, source, mesh=mesh, max_bytes=15)
    assert first.document_bytes.tolist() == [9, 0, 6, 0, 0, 0]
    assert first.document_nats[2] == pytest.approx(nats_of(source.whole(2))[:6].sum(), rel=1e-4)


def test_documents_go_side_by_side():
  documents = [["a1", "a2", "a3"], [], ["b1"], ["c1", "c2"], ["d1"]]
  assert list(side_by_side(documents, 2)) == [["a1", "b1"], ["a2", "c1"], ["a3", "c2"], ["d1", None]]
  assert list(one_after_the_other(documents, 3)) == [["a1", "a2", "a3"], ["b1", "c1", "c2"], ["d1"]]
  assert list(side_by_side([], 2)) == []


def test_other_methods_are_refused_in_one_line():
  for method in ("sliding", "strided", "both"):
    with pytest.raises(ConfigError, match=f"method={method} reads bytes again, but Transformer-XL remembers"):
      check_method(CONFIG.model, method)


def test_what_is_generated_has_the_probabilities_of_the_evaluation(model, nats_of):
  prompt = Documents().whole(0).tobytes()
  made = generate(model, prompt, 12, num_samples=2, seed=1)
  for row, nats in zip(made.bytes_, made.nats, strict=True):
    expected = nats_of(np.concatenate([np.frombuffer(prompt, np.uint8), row]))
    np.testing.assert_allclose(nats, expected[9:], rtol=1e-4, atol=1e-4)
  assert made.bytes_[0].tobytes() != made.bytes_[1].tobytes()
  greedy = generate(model, prompt, 3, sampling=Sampling(temperature=0))
  assert generate(model, prompt + greedy.bytes_[0].tobytes(), 1, sampling=Sampling(temperature=0)).bytes_.size == 1


@pytest.mark.parametrize("stored", [False, True])
def test_compression_goes_through_segments_and_begins_anew_after_stored_blocks(model, nats_of, monkeypatch, stored):
  text = Documents().whole(2)
  monkeypatch.setattr(entropy_coding, "_BLOCK", 7)  # blocks of two segments: 8, 8 and 1 bytes
  blocks = iter(range(99))
  monkeypatch.setattr(entropy_coding, "pays", lambda coded, plain: not (stored and next(blocks) == 0))
  seen = []
  original = entropy_coding.check_finite
  monkeypatch.setattr(entropy_coding, "check_finite", lambda p_BV: seen.append(p_BV[0].copy()) or original(p_BV))
  code = entropy_coding.encode(model, text, 1)
  nats = [-np.log(p_V[byte]) for p_V, byte in zip(seen, text, strict=True)]
  expected = nats_of(text)
  if stored:
    expected = np.concatenate([expected[:8], nats_of(text[8:])])
  np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(entropy_coding.decode(model, code, len(text), 1), text)
  assert entropy_coding.batch_size(1000, CONFIG.model, 64) == 1


def test_steps_are_lowered():
  mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
  for step in ("train", "eval", "generate"):
    assert "6x16xf32" in lower(CONFIG, mesh, step).as_text() or step == "generate"
