"""Evaluation scores every byte exactly once, and its sums are what a plain loop over windows finds."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from model_variants import VARIANTS, draw_parameters, is_perceiver

from megabyte_jax.config import Config, Level, MegabyteConfig, MeshConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation import windows
from megabyte_jax.evaluation.evaluate import evaluate, make_eval_step
from megabyte_jax.evaluation.nats_of_each_byte import FirstBytes
from megabyte_jax.models.loss import bits_per_byte
from megabyte_jax.parallel.sharding import make_mesh

ONE = make_mesh(MeshConfig(data=1), jax.devices()[:1])
SMALL = Level(patch_size=1, width=8, num_layers=1, num_heads=1)
TWO_LEVELS = MegabyteConfig(
  context=12, levels=(Level(patch_size=4, width=16, num_layers=1, num_heads=2), SMALL), dropout=0.0
)
TRANSFORMER = MegabyteConfig(context=12, levels=(SMALL,), dropout=0.0)
PERCEIVER = PerceiverARConfig(context=12, latents=4, width=8, num_layers=1, num_heads=1, dropout=0.0)
MODELS = {"two": TWO_LEVELS, "bytes": TRANSFORMER, "latents": PERCEIVER, **VARIANTS}


def methods(model):
  """Those that suit the model."""
  bytewise = isinstance(model, PerceiverARConfig) or model.levels[0].patch_size == 1
  return ("basic", "sliding") if bytewise else windows.METHODS


OWN = [pytest.param(MODELS[n], m, id=f"{n}-{m}") for n in ("two", "bytes", "latents") for m in methods(MODELS[n])]
CASES = [pytest.param(MODELS[name], m, id=f"{name}-{m}") for name in MODELS for m in methods(MODELS[name])]


class Documents:
  """A source in memory."""

  slow, joinable, unit, skipped, fingerprint = False, True, 1, 0, ""

  def __init__(self, *documents):
    self.documents = [np.frombuffer(document, np.uint8) for document in documents]
    self.lengths = np.array([len(document) for document in self.documents])
    self.names = [str(i) for i in range(len(documents))]

  def read(self, document, start, stop):
    assert 0 <= start <= stop <= self.lengths[document]
    return self.documents[document][start:stop]


def random_documents(*lengths):
  rng = np.random.default_rng(0)
  return Documents(*(rng.bytes(length) for length in lengths))


def config_for(model, batch_size=3):
  return Config(model=dataclasses.replace(model, vocab_size=256), batch_size=batch_size, num_steps=1)


def pretend(parameters, x_BT, length_B, start_B=None):
  """Nats that tell where a byte was scored: its value, plus a little for its place in the window."""
  return np.asarray(x_BT) + np.arange(x_BT.shape[1], dtype=np.float32) / 1024


class Record:
  """Collects what on_byte_nats is told."""

  def __init__(self, source):
    self.nats = [np.zeros(length) for length in source.lengths]
    self.times = [np.zeros(length, int) for length in source.lengths]

  def __call__(self, document, start, nats, mask):
    place = slice(start, start + len(nats))
    self.nats[document][place] += np.where(mask, nats, 0)
    self.times[document][place] += mask


@pytest.mark.parametrize(("model", "method"), CASES)
def test_every_byte_is_scored_once_whatever_the_lengths(model, method):
  source = random_documents(*range(40), 131)
  batch_size = 1 if method == "sliding" else 5
  record = Record(source)
  shown = []
  result = evaluate(
    config_for(model, batch_size),
    None,
    source,
    mesh=ONE,
    method=method,
    eval_step=pretend,
    on_byte_nats=record,
    on_progress=lambda done, total: shown.append((done, total)),
  )
  total = int(source.lengths.sum())
  assert all((times == 1).all() for times in record.times)
  assert result.bytes == total and shown[-1] == (total, total)
  assert result.bytes_read == total if (method, is_perceiver(model)) == ("basic", False) else result.bytes_read > total
  np.testing.assert_array_equal(result.document_bytes, source.lengths)
  for found, text in zip(record.nats, source.documents, strict=True):
    np.testing.assert_array_equal(np.floor(found), text)  # the nats of the byte itself, not of a neighbour
  np.testing.assert_allclose(result.document_nats, [nats.sum() for nats in record.nats], rtol=1e-12)
  # By position: the fraction says where in its window a byte was scored.
  place = np.round(np.concatenate([nats % 1 for nats in record.nats]) * 1024).astype(int)
  np.testing.assert_array_equal(result.context_bytes, np.bincount(place, minlength=model.context))
  patch = 1
  if isinstance(model, MegabyteConfig):  # without a global model the spans of the local one are the patches
    patch = max(model.span, model.levels[0].patch_size)
  np.testing.assert_array_equal(result.patch_bytes, np.bincount(place % patch, minlength=patch))
  assert result.context_nats.sum() == pytest.approx(result.nats) == result.patch_nats.sum()


@pytest.mark.parametrize(("lengths", "rows"), [((5,), 1), ((5, 0, 7), 2), ((5, 7, 9, 11), 3)])
def test_no_more_rows_than_there_are_windows(lengths, rows):
  shapes = []

  def step(parameters, x_BT, length_B):
    shapes.append(x_BT.shape)
    return pretend(parameters, x_BT, length_B)

  result = evaluate(config_for(TWO_LEVELS, 3), None, random_documents(*lengths), mesh=ONE, eval_step=step)
  assert result.bytes == sum(lengths) and {shape[0] for shape in shapes} == {rows}


def test_sums_are_float64():
  """Float32 would stop growing: 2^24 + 1 is no float32."""

  def step(parameters, x_BT, length_B):
    return np.where(np.arange(x_BT.shape[1]) == 0, np.float32(2**24), np.float32(1)) + 0 * np.asarray(x_BT)

  result = evaluate(config_for(TWO_LEVELS), None, random_documents(12, 12), mesh=ONE, eval_step=step)
  assert result.nats == 2 * (2**24 + 11)
  assert result.document_nats.dtype == result.context_nats.dtype == np.float64


@pytest.mark.parametrize(
  ("max_bytes", "expected"), [(7, [7, 0, 0]), (12, [12, 0, 0]), (15, [12, 0, 3]), (99, [12, 0, 20])]
)
def test_max_bytes_takes_the_first_ones(max_bytes, expected):
  source = random_documents(12, 0, 20)
  record = Record(source)
  result = evaluate(
    config_for(TWO_LEVELS), None, source, mesh=ONE, eval_step=pretend, max_bytes=max_bytes, on_byte_nats=record
  )
  assert result.document_bytes.tolist() == expected
  for times, count in zip(record.times, expected, strict=True):
    assert times.tolist() == [1] * count + [0] * (len(times) - count)


@pytest.mark.parametrize(("model", "method"), OWN)
@pytest.mark.parametrize("count", [1, 7, 12, 15, 33, 0])
def test_the_first_bytes_of_a_whole_evaluation_are_those_of_a_partial_one(model, method, count):
  source = random_documents(12, 0, 20, 31)
  scoring = {"mesh": ONE, "method": method, "eval_step": pretend}
  first = FirstBytes(source, count)
  evaluate(config_for(model), None, source, on_byte_nats=first.put, **scoring)
  partial = evaluate(config_for(model), None, source, max_bytes=count, **scoring)
  assert first.bpb == pytest.approx(partial.bpb, rel=1e-12)


def test_nothing_to_score_is_an_error():
  with pytest.raises(ConfigError, match="not a single byte"):
    evaluate(config_for(TWO_LEVELS), None, random_documents(0, 0), mesh=ONE, eval_step=pretend)


# -- With models --


def by_hand(config, parameters, source, method):
  """Nats of each document by a loop over windows, one at a time and unpadded where the model can."""
  step = make_eval_step(config)
  totals = []
  for document in source.documents:
    total = 0.0
    for window in windows.windows_of(len(document), config.model, method):
      x_T = np.zeros(config.model.context, np.uint8)
      x_T[: window.length] = document[window.start : window.start + window.length]
      x_T[window.length :] = 77  # padding must not matter
      rest = (np.array([window.latent_start]),) if isinstance(config.model, PerceiverARConfig) else ()
      nats_T = np.asarray(step(parameters, x_T[None], np.array([window.length]), *rest))[0]
      total += sum(float(nats_T[i]) for i in np.flatnonzero(windows.scored_mask(window)))
    totals.append(total)
  return totals


@pytest.fixture(scope="module")
def steps():
  """One compiled evaluation step for each model."""
  return {model: make_eval_step(config_for(model)) for model in (TWO_LEVELS, TRANSFORMER, PERCEIVER)}


@pytest.mark.parametrize(("model", "method"), OWN)
def test_bits_per_byte_by_hand(steps, model, method):
  config = config_for(model)
  parameters = draw_parameters(model)
  source = random_documents(30, 5, 0, 12, 13)
  expected = by_hand(config, parameters, source, method)
  result = evaluate(config, parameters, source, mesh=ONE, method=method, eval_step=steps[model])
  np.testing.assert_allclose(result.document_nats, expected, rtol=1e-5)
  assert result.bpb == pytest.approx(sum(expected) / 60 / math.log(2), rel=1e-6)
  # A document's bits do not depend on its neighbours.
  alone = evaluate(config, parameters, random_documents(30), mesh=ONE, method=method, eval_step=steps[model])
  assert alone.nats == pytest.approx(result.document_nats[0], rel=1e-6)


def test_batch_size_and_devices_do_not_change_the_result():
  parameters = draw_parameters(TWO_LEVELS)
  source = random_documents(100, 31, 7)
  results = []
  for batch_size, mesh in ((1, ONE), (7, ONE), (5, make_mesh(MeshConfig(data=2, fsdp=2, seq=1, tensor=2)))):
    config = dataclasses.replace(config_for(TWO_LEVELS), batch_size=batch_size)
    results.append(evaluate(config, parameters, source, mesh=mesh, method="both"))
  for other in results[1:]:
    assert other.nats == pytest.approx(results[0].nats, rel=1e-6)
    np.testing.assert_array_equal(other.document_bytes, results[0].document_bytes)
    np.testing.assert_allclose(other.context_nats, results[0].context_nats, rtol=1e-5)


def test_bits_per_byte_of_nothing_are_no_number():
  assert math.isnan(bits_per_byte(0, 0)) and math.isnan(bits_per_byte(0.0, 0.0))
