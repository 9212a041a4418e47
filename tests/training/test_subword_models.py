"""Models of subwords: trained, resumed, scored in bytes of the text, generated with, exported; and what is refused."""

import dataclasses
import math
import shutil
import sys

import jax
import numpy as np
import pytest
from model_variants import draw_parameters
from run_commands import MESH, assert_bitwise_equal, evaluate_command, metric_lines, saved_state
from tokenizer_file import PIECES, tokenizer_file

import train
from megabyte_jax.checkpoints.exported import export_model
from megabyte_jax.checkpoints.saved_config import load_config
from megabyte_jax.commands import compress, generate
from megabyte_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  Level,
  MegabyteConfig,
  OptimizerConfig,
  PerceiverARConfig,
  TransformerXLConfig,
)
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_path
from megabyte_jax.data.subwords.source import token_lengths
from megabyte_jax.data.subwords.tokenizer import load_tokenizer
from megabyte_jax.data.subwords.training import train_tokenizer
from megabyte_jax.errors import CheckpointError, ConfigError
from megabyte_jax.evaluation.by_source import by_source
from megabyte_jax.evaluation.evaluate import evaluate, make_eval_step
from megabyte_jax.evaluation.nats_of_each_byte import FirstBytes
from megabyte_jax.generation.subword_text import generate_text
from megabyte_jax.models.build import trained_model
from megabyte_jax.training.state import initial_state, make_train_step

LEVEL = Level(patch_size=1, width=16, num_layers=1, num_heads=2)
TRANSFORMER = MegabyteConfig(context=16, levels=(LEVEL,), vocab_size=PIECES, init_std=0.02)
PERCEIVER = PerceiverARConfig(
  context=16, latents=8, width=16, num_layers=1, num_heads=2, vocab_size=PIECES, dropout=0.0
)
TRANSFORMER_XL = TransformerXLConfig(
  context=16, memory_length=16, width=16, num_layers=1, num_heads=2, vocab_size=PIECES, dropout=0.0
)
NOVEL = (SAMPLE_FOLDER + "/text/train/moby_dick.txt", 30_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("subwords")
  with open(NOVEL[0], "rb") as file:
    file.seek(NOVEL[1])
    (folder / "train.txt").write_bytes(file.read(6000))
    (folder / "a.txt").write_bytes(file.read(700) + b"\xff\0\n")
    (folder / "b.txt").write_bytes(file.read(300))
  return folder


@pytest.fixture(scope="module")
def config(folder):
  shutil.copy(tokenizer_file(), folder / "mine.model")
  data = DataConfig(
    train=str(folder / "train.txt"),
    validation=f"{folder / 'a.txt'},{folder / 'b.txt'}",
    form="subwords",
    tokenizer=str(folder / "mine.model"),
    cache_dir=str(folder / "cache"),
  )
  return Config(
    model=TRANSFORMER,
    data=data,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    checkpoint=CheckpointConfig(every_steps=2),
    eval=EvalConfig(every_steps=4, max_bytes=500, batch_size=8),
    batch_size=8,
    num_steps=4,
    log_every=2,
    sample_bytes=5,
  )


@pytest.fixture(scope="module")
def run(folder, config):
  train.train(config, str(folder / "run"))
  return folder / "run"


def test_loss_is_in_bits_of_the_texts_bytes(run, config):
  lines = [line for line in metric_lines(run) if "loss" in line]
  assert [line["step"] for line in lines] == [2, 4]
  for line in lines:
    assert line["bpb"] == pytest.approx(line["loss"] / math.log(2))
    assert line["nats_per_token"] == pytest.approx(line["loss"] * line["bytes_per_token"])
  assert lines[0]["nats_per_token"] == pytest.approx(math.log(PIECES), rel=0.02)  # it begins with all pieces alike
  source = open_path(config.data.train, config.data)
  assert lines[0]["bytes_per_token"] == pytest.approx(6000 / source.lengths[0], rel=0.1)


def test_resuming_is_exact(run, folder, config):
  again = folder / "again"
  shutil.copytree(run, again)
  shutil.rmtree(again / "checkpoints" / "4")
  (folder / "mine.model").rename(folder / "moved.model")  # a copy of the tokenizer is as good
  data = dataclasses.replace(config.data, tokenizer=str(folder / "moved.model"))
  try:
    train.train(dataclasses.replace(config, data=data), str(again))
  finally:
    (folder / "moved.model").rename(folder / "mine.model")
  assert_bitwise_equal(saved_state(again), saved_state(run))
  assert metric_lines(again) == metric_lines(run)


def test_evaluation_counts_the_texts_bytes(run, folder, config, monkeypatch):
  lines, result = evaluate_command(monkeypatch, "--workdir", run, "--words=count", "--no-compressors")
  assert result["bytes"] == result["bytes_read"] == 1003
  source = open_path(config.data.validation, config.data)
  assert result["tokens"] == source.lengths.sum() < 1003
  assert result["bpb"] == pytest.approx(result["nats"] / 1003 / math.log(2))
  assert [(one["bytes"], one["documents"]) for one in result["sources"]] == [(703, 1), (300, 1)]
  assert result["word_perplexity"] == pytest.approx(math.exp(result["nats"] / result["words"]))
  assert result["tokenizer_sha256"] == load_config(run).data.tokenizer_sha256
  assert any(f"{result['tokens']:,} tokens" in line for line in lines)
  with pytest.raises(ConfigError, match="--per-byte-out is for models that read bytes"):
    evaluate_command(monkeypatch, "--workdir", run, f"--per-byte-out={folder / 'x.npy'}")


@pytest.mark.parametrize(
  ("model", "method"),
  [(TRANSFORMER, "basic"), (TRANSFORMER, "sliding"), (PERCEIVER, "basic"), (TRANSFORMER_XL, "basic")],
)
def test_every_token_is_scored_once(config, model, method):
  """With nats that are each token's bytes, sums of nats and of bytes agree wherever they are taken."""
  config = dataclasses.replace(config, model=model)
  source = open_path(config.data.validation, config.data)
  table = token_lengths(source)

  def step(parameters, x_BT, length_B, start_B=None):
    return table[np.asarray(x_BT)].astype(np.float32)

  def segment(parameters, memory, x_BT, length_B, fresh_B):
    return step(parameters, x_BT, length_B), memory

  first = FirstBytes(source, 500)
  scoring = {"mesh": MESH, "method": method, "eval_step": segment if model.recurrent else step}
  parameters = draw_parameters(model) if model.recurrent else None
  result = evaluate(config, parameters, source, on_byte_nats=first.put, **scoring)
  assert result.bytes == 1003 == result.nats and result.tokens == source.lengths.sum()
  np.testing.assert_array_equal(result.context_bytes, result.context_nats)
  assert result.document_bytes.tolist() == [703, 300]
  assert [one.bytes for one in by_source(source, result)] == [703, 300]
  part = evaluate(config, parameters, source, max_bytes=500, **scoring)
  assert 500 <= part.bytes < 500 + table.max() and part.bpb == pytest.approx(first.bpb)


def test_training_steps_of_recurrent_models_count_bytes(config):
  config = dataclasses.replace(config, model=TRANSFORMER_XL)
  source = open_path(config.data.train, config.data)
  x_BT = np.stack([source.read(0, 16 * row, 16 * row + 16) for row in range(8)])
  with jax.set_mesh(MESH):
    state = initial_state(config, MESH)
    _, metrics = make_train_step(config, token_lengths(source))(state, x_BT, None, np.ones(8, bool))
  assert metrics["tokens"] == 8 * 16 and metrics["bytes"] == token_lengths(source)[x_BT].sum()
  assert metrics["nats"] / metrics["tokens"] == pytest.approx(math.log(PIECES), rel=0.2)


def test_perceiver_ar_is_the_same_model_for_tokens(config):
  """Nats of a window are those of the logits, by an independent sum."""
  parameters = draw_parameters(PERCEIVER)
  x_BT = np.random.default_rng(0).integers(0, PIECES, (3, 16)).astype(np.uint16)
  with jax.set_mesh(MESH):
    nats = make_eval_step(dataclasses.replace(config, model=PERCEIVER))(
      parameters, x_BT, np.full(3, 16, np.int32), np.full(3, 8, np.int32)
    )
    logits = np.asarray(jax.jit(lambda p: trained_model(PERCEIVER, p)(x_BT))(parameters), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  expected = -np.take_along_axis(log_p, x_BT[:, 8:, None].astype(int), axis=-1)[..., 0]
  np.testing.assert_allclose(nats[:, 8:], expected, rtol=1e-4)
  assert not np.asarray(nats[:, :8]).any()


def test_generation_gives_bytes(run, monkeypatch, capfdbinary):
  monkeypatch.setattr(
    sys, "argv", ["generate", f"--workdir={run}", "--prompt=the sea\udcff", "--bytes=20", "--temperature=0.7"]
  )
  generate.main()
  printed = capfdbinary.readouterr().out
  assert printed.startswith(b"the sea\xff") and len(printed) >= len(b"the sea\xff") + 20


def test_a_text_ends_at_its_stop_and_at_its_bytes():
  tokenizer = load_tokenizer(tokenizer_file())
  the = tokenizer.pieces.index(b" the")
  parameters = draw_parameters(TRANSFORMER)
  table = np.zeros_like(parameters["levels"][0]["embedder"]["table"])
  table[the] = 100.0  # always the same piece
  parameters["levels"][0]["embedder"]["table"] = table
  model = trained_model(TRANSFORMER, parameters)
  model.levels[0].embedder.pad[...] = 1.0
  from megabyte_jax.generation.sampling import Sampling  # noqa: PLC0415

  options = {"sampling": Sampling(temperature=0.0)}
  [text] = generate_text(model, tokenizer, b"a", 10, **options)
  if not text.startswith(b" the"):
    pytest.fail(f"the model was to repeat one piece, not {text!r}")
  assert text == b" the" * 3  # at least ten bytes
  came = []
  [text] = generate_text(model, tokenizer, b"a", 100, stop=b"the t", on_bytes=came.append, **options)
  assert text == b" the t" == b"".join(came)


def test_export_keeps_the_tokenizer(run, folder, config, monkeypatch):
  exported = folder / "exported"
  loaded = load_config(run)
  export_model(str(exported), loaded, saved_state(run)[1], 4)
  assert (exported / "tokenizer.model").read_bytes() == (folder / "mine.model").read_bytes()
  assert load_config(exported).data.tokenizer == str(exported / "tokenizer.model")
  _, result = evaluate_command(monkeypatch, "--workdir", exported, "--no-compressors")
  _, expected = evaluate_command(monkeypatch, "--workdir", run, "--no-compressors")
  assert result["nats"] == pytest.approx(expected["nats"])


def test_a_changed_tokenizer_is_refused(run, folder, config, tmp_path, monkeypatch):
  train_tokenizer(["sample:text/validation"], str(tmp_path / "other.model"), PIECES, DataConfig(), 50_000)
  other = dataclasses.replace(config.data, tokenizer=str(tmp_path / "other.model"))
  with pytest.raises(CheckpointError, match=r"data\.tokenizer_sha256: "):
    train.train(dataclasses.replace(config, data=other), str(run))
  assert (run / "tokenizer.model").read_bytes() == (folder / "mine.model").read_bytes()
  copy = tmp_path / "copy"
  shutil.copytree(run, copy)
  shutil.copy(tmp_path / "other.model", copy / "tokenizer.model")
  with pytest.raises(ConfigError, match=r"the tokenizer .*tokenizer\.model has changed"):
    evaluate_command(monkeypatch, "--workdir", copy)


def test_compression_is_for_models_of_bytes(run, folder):
  with pytest.raises(ConfigError, match="is a model of subwords; compress with one that reads bytes"):
    compress.main([str(folder / "a.txt"), str(folder / "out"), f"--workdir={run}"])
