"""train.py end to end on tiny models: a golden step, what a run leaves behind, every family of models."""

import dataclasses
import json
import shutil
import sys
import types

import jax
import numpy as np
import pytest
import tiny_config
from fake_trackers import FakeWandb
from run_commands import (
  MESH,
  assert_bitwise_equal,
  evaluate_command,
  metric_lines,
  saved_state,
  write_data,
)

import train
from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  Level,
  MegabyteConfig,
  OptimizerConfig,
  PerceiverARConfig,
)
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import open_source
from megabyte_jax.display import metrics
from megabyte_jax.errors import CheckpointError, ConfigError
from megabyte_jax.evaluation.evaluate import make_eval_step
from megabyte_jax.parallel.sharding import batch_sharding
from megabyte_jax.training.state import initial_state, make_train_step

TINY = Config.from_dict(tiny_config.get_config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("train"))


@pytest.fixture
def config(folder):
  return dataclasses.replace(
    TINY, data=DataConfig(train=str(folder / "train.txt"), validation=str(folder / "validation")), num_steps=4
  )


# -- One step --

GOLDEN_LOSSES = (5.5504851, 5.5554848, 5.5282784)
GOLDEN_CHECKSUM = 445.97997
IF_THE_CHANGE_WAS_MEANT = (
  "three training steps of tests/tiny_config.py no longer give the numbers they gave. If the model, its initial "
  "values, the data's order or the optimizer was changed on purpose, put losses {} and checksum {} into this test, "
  "and tell users that runs begun earlier no longer continue exactly"
)


def test_golden_steps():
  config = dataclasses.replace(TINY, num_steps=500)
  state, step = initial_state(config, MESH), make_train_step(config)
  source = open_source(config.data, "train")
  data = batches(source, batch_size=8, context=32, seed=0, num_steps=3, num_threads=0, sharding=batch_sharding(MESH))
  losses = []
  with jax.set_mesh(MESH):
    for _, batch in data:
      state, values = step(state, batch.x_BT)
      losses.append(float(values["nats"]) / float(values["bytes"]))
  checksum = sum(float(np.abs(np.asarray(leaf, np.float64)).sum()) for leaf in jax.tree.leaves(state.parameters))
  message = IF_THE_CHANGE_WAS_MEANT.format(losses, checksum)
  assert losses == pytest.approx(GOLDEN_LOSSES, rel=2e-5), message
  assert checksum == pytest.approx(GOLDEN_CHECKSUM, rel=1e-5), message


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
  model = MegabyteConfig(context=32, levels=TINY.model.levels[:1], dropout=0.0)
  rng = np.random.default_rng(0)
  x_BT = rng.integers(0, 256, (8, 32), np.uint8)
  length_B = np.array([32, 1, 7, 32, 30, 2, 5, 9], np.int32)  # parts of unequal weight
  results = []
  for parts in (1, 4):
    config = dataclasses.replace(TINY, model=model, accumulate=parts)
    state, values = make_train_step(config)(initial_state(config, MESH), x_BT, length_B)
    assert float(values["bytes"]) == length_B.sum()
    results.append((values, state.opt_state))
  for one, other in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_runs_that_are_alike_share_their_programs_and_others_do_not():
  step, scoring = make_train_step(TINY), make_eval_step(TINY)
  alike = dataclasses.replace(TINY, data=DataConfig(train="another"), log_every=7)
  assert make_train_step(alike) is step and make_eval_step(alike) is scoring
  model = dataclasses.replace(TINY.model, dropout=0.5)
  for changes in ({"seed": 1}, {"num_steps": 99}, {"optimizer": OptimizerConfig(b1=0.5)}, {"model": model}):
    assert make_train_step(dataclasses.replace(TINY, **changes)) is not step
  assert make_eval_step(dataclasses.replace(TINY, model=model)) is not scoring
  assert make_train_step(TINY, np.ones(256, np.int32)) is not step


# -- Whole runs: the baselines, and what a run leaves behind --

SMALL = {"width": 16, "num_layers": 1, "num_heads": 2}
TRANSFORMER = MegabyteConfig(context=32, levels=(Level(patch_size=1, **SMALL),), init_std=0.02)
PERCEIVER = PerceiverARConfig(context=32, latents=8, init_std=0.02, **SMALL)


def check_run(config, workdir, monkeypatch, name, traced=True):
  train.train(config, str(workdir))
  losses = [line["loss"] for line in metric_lines(workdir) if "loss" in line]
  assert losses[0] > 5 and losses[-1] < 4
  table, result = evaluate_command(monkeypatch, "--workdir", workdir)
  assert any(line.split()[0] == name for line in table if line.strip())
  assert result["bpb"] == pytest.approx(metric_lines(workdir)[-1]["validation_bpb"], rel=1e-6)
  assert result["bpb"] < 5.5
  assert (result["split"], result["step"], result["bytes"]) == ("validation", 40, 1000)
  assert traced == bool([path for path in (workdir / "trace").rglob("*") if path.is_file()])


def test_a_transformer_and_what_its_run_leaves_behind(config, tmp_path, monkeypatch, capsys):
  workdir = tmp_path / "run"
  monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
  options = {"profile_steps": (2, 3), "sample_bytes": 8, "checkpoint": CheckpointConfig(every_steps=25)}
  options["tracker"] = "wandb"
  validation = shutil.copytree(config.data.validation, tmp_path / "validation")
  (validation / "b.txt").write_bytes((validation / "b.txt").read_bytes().replace(b"e", b"\xe9", 1))
  options["data"] = dataclasses.replace(config.data, validation=str(validation))
  config = dataclasses.replace(config, model=TRANSFORMER, num_steps=40, log_every=10, **options)
  check_run(config, workdir, monkeypatch, "Transformer")
  output = capsys.readouterr().out
  words = ["step 40/40  loss ", "bits per byte on 1,000 bytes (2 documents", "primed", "a sample", "try next"]
  words.append("notice  validation: not in UTF-8: b.txt; if that is Latin-1")
  assert not [word for word in words if word not in output]
  lines = metric_lines(workdir)
  assert [line["step"] for line in lines] == [10, 20, 30, 40, 40]
  expected = [0.01 * (40 - step) / 35 for step in (9, 19, 29, 39)]
  assert [line["learning_rate"] for line in lines[:4]] == pytest.approx(expected, rel=1e-4)
  assert (workdir / "loss.png").read_bytes()[:4] == b"\x89PNG"
  (events,) = (workdir / "tensorboard").iterdir()
  assert not [name for name in (b"loss", b"grad_norm", b"validation_bpb") if name not in events.read_bytes()]
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()) == ["25", "40"]
  *logged, picture = [call[1] for call in wandb.calls if call[0] == "log"]
  assert [(values["step"], "validation_bpb" in values) for values in logged] == [
    (10, 0),
    (20, 0),
    (30, 0),
    (40, 0),
    (40, 1),
  ]
  assert picture == {"loss": ("image", str(workdir / "loss.png"))} and wandb.calls[-1] == ("finish", 0)


@pytest.mark.slow
def test_perceiver_ar(config, tmp_path, monkeypatch):
  config = dataclasses.replace(config, model=PERCEIVER, num_steps=40, log_every=10)
  check_run(config, tmp_path / "run", monkeypatch, "PerceiverAR", traced=False)


@pytest.mark.slow
def test_a_trace_that_the_run_ends_within(config, tmp_path, monkeypatch):
  config = dataclasses.replace(config, model=PERCEIVER, num_steps=40, log_every=10, profile_steps=(38, 99))
  check_run(config, tmp_path / "run", monkeypatch, "PerceiverAR")


# -- Fine-tuning --


@pytest.fixture
def one_level(config):
  """Quicker to compile; which arrays fit is a matter of their names and shapes only."""
  return dataclasses.replace(config, model=dataclasses.replace(config.model, levels=TINY.model.levels[:1]))


@pytest.fixture
def trained(one_level, folder):
  """A finished run."""
  config, workdir = one_level, folder / "trained"
  if not workdir.exists():
    train.train(dataclasses.replace(config, data=no_validation(config), num_steps=15), str(workdir))
  return workdir


def no_validation(config):
  return dataclasses.replace(config.data, validation="")


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.mark.slow
def test_fine_tuning_to_a_longer_context_starts_where_the_old_model_stood(one_level, trained, tmp_path, monkeypatch):
  config = one_level
  longer = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, context=64),
    data=no_validation(config),
    num_steps=1,  # its learning rate is that of step 0, which is 0
  )
  train.train(longer, str(tmp_path / "longer"), init_from=str(trained))
  short = tmp_path / "short"
  short.mkdir()
  text = (trained.parent / "train.txt").read_bytes()
  for i in range(10):
    (short / f"{i}.txt").write_bytes(text[100 * i : 100 * i + 32 - i])
  _, old = evaluate_command(monkeypatch, "--workdir", trained, "--data", short)
  _, new = evaluate_command(monkeypatch, "--workdir", tmp_path / "longer", "--data", short)
  assert new["nats"] == pytest.approx(old["nats"], rel=1e-5)
  assert old["bpb"] < 7  # it has learnt something
  assert "split" not in new

  before, after = by_name(saved_state(trained)[1]), by_name(saved_state(tmp_path / "longer")[1])
  positions = "levels.0.embedder.positions"
  old_positions, new_positions = before.pop(positions), after.pop(positions)
  assert len(new_positions) == 2 * len(old_positions)
  np.testing.assert_array_equal(new_positions[: len(old_positions)], old_positions)
  assert new_positions[len(old_positions) :].std() > 0  # freshly drawn
  assert_bitwise_equal(after, before)


def test_fine_tuning_from_what_does_not_fit(one_level, trained, tmp_path):
  config = dataclasses.replace(one_level, data=no_validation(one_level))
  levels = (*config.model.levels, Level(patch_size=1, **SMALL))
  deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, levels=levels))
  has_settings = r"of .*trained does not fit this config; give .*; .*trained/config\.json has its"
  with pytest.raises(CheckpointError, match=has_settings):
    train.train(deeper, str(tmp_path / "new"), init_from=str(trained))
  wide = dataclasses.replace(config.model.levels[0], num_layers=3, conv_filters=(3,))
  wider = dataclasses.replace(config, model=dataclasses.replace(config.model, levels=(wide,), context=64, dropout=0.0))
  flags = r"or its settings: '--config.model.levels\[0\].conv_filters=\(\)' '--config.model.levels\[0\].num_layers=1'$"
  with pytest.raises(CheckpointError, match=flags):
    train.train(wider, str(tmp_path / "new"), init_from=str(trained))
  perceiver = dataclasses.replace(config, model=PERCEIVER)
  with pytest.raises(CheckpointError, match=has_settings):
    train.train(perceiver, str(tmp_path / "new"), init_from=str(trained))
  with pytest.raises(ConfigError, match=r"holds a run already, which did not start from x; take another --workdir"):
    train.train(dataclasses.replace(config, num_steps=15), str(trained), init_from="x")


def test_fine_tuning_says_which_settings_of_the_model_differ(one_level, trained, tmp_path, capsys):
  config = dataclasses.replace(one_level, data=no_validation(one_level), num_steps=1)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, activation="gelu", remat="full"))
  train.train(config, str(tmp_path), init_from=str(trained))
  assert f"settings of the model that are not those of {trained}: model.activation\n" in capsys.readouterr().out


def test_bytes_that_the_model_does_not_know(one_level, tmp_path):
  config = dataclasses.replace(one_level, model=dataclasses.replace(one_level.model, vocab_size=100))
  with pytest.raises(ConfigError, match=r"knows only bytes below 100 \(model\.vocab_size\); the data have \d+"):
    train.train(config, str(tmp_path))


def test_speeds_beside_checkpoints_are_those_of_other_steps(one_level, tmp_path, monkeypatch):
  """On a CPU a step is done when its call returns; read a step late, the steps that are saved took no time."""
  now = [0.0]
  monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
  made = train.make_train_step

  def two_seconds_each(*arguments):
    step = made(*arguments)

    def timed(*batch):
      now[0] += 2
      return step(*batch)

    return timed

  monkeypatch.setattr(train, "make_train_step", two_seconds_each)
  options = {"data": no_validation(one_level), "checkpoint": CheckpointConfig(every_steps=3), "num_steps": 7}
  train.train(dataclasses.replace(one_level, **options), str(tmp_path))
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["bytes_per_second"] for line in lines] == [None] + 6 * [8 * 32 / 2]


@pytest.mark.slow
def test_the_last_step_can_be_the_best_of_partial_evaluations(config, tmp_path):
  """Those during training score the first bytes alone; that of the last step which they are compared with does, too."""
  limits = EvalConfig(every_steps=2, max_bytes=100)
  config = dataclasses.replace(config, eval=limits, checkpoint=CheckpointConfig(every_steps=0, keep_best=1))
  train.train(config, str(tmp_path))
  bits = {
    int(step): bpb for step, bpb in json.loads((tmp_path / "checkpoints/validation_bpb.json").read_text()).items()
  }
  logged = {line["step"]: line["validation_bpb"] for line in metric_lines(tmp_path) if "validation_bpb" in line}
  assert bits == logged and set(bits) == {2, 4}
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.best_step() == min(bits, key=bits.__getitem__)
