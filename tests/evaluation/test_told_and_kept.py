"""What evaluations say and keep: scores of earlier steps, pictures, data that are trained on or are not here."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tiny_config
from run_commands import write_data

import eval as command
import train
from megabyte_jax.checkpoints.exported import export_model
from megabyte_jax.checkpoints.saved_config import load_config
from megabyte_jax.checkpoints.trained_model import load
from megabyte_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig
from megabyte_jax.data.open_data import open_source
from megabyte_jax.display import plots
from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation import kept, report
from megabyte_jax.evaluation.evaluate import Evaluation
from megabyte_jax.evaluation.positions import write_positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def workdir(folder):
  """A finished run of 6 steps, with that of step 3."""
  config = Config.from_dict(tiny_config.get_config("1"))
  data = DataConfig(train=str(folder / "train.txt"), validation=str(folder / "validation"))
  saving = CheckpointConfig(every_steps=3, keep=4)
  config = dataclasses.replace(config, data=data, checkpoint=saving, eval=EvalConfig(batch_size=16), num_steps=6)
  train.train(config, str(folder / "run"))
  return folder / "run"


@pytest.fixture
def drawn(monkeypatch):
  """Titles of pictures by file; nothing is drawn."""
  titles = {}
  monkeypatch.setattr(
    plots, "loss_by_position", lambda values, path, title, *_, **__: titles.update({pathlib.Path(path).name: title})
  )
  return titles


@pytest.fixture
def evaluate(workdir, drawn):
  return lambda *flags: json.loads(command.main([f"--workdir={workdir}", "--no-compressors", *map(str, flags)]))


def test_training_keeps_the_score_that_eval_would(workdir, evaluate):
  file = workdir / "eval_validation_basic.json"
  file.unlink()
  train.train(load_config(workdir), str(workdir))  # all steps are done: only what follows them
  of_training = json.loads(file.read_text())
  of_eval = evaluate()
  assert json.loads(file.read_text()) == of_eval
  for values in (of_training, of_eval):
    del values["seconds"]
    values["nats"], values["bpb"] = (pytest.approx(values[name], rel=1e-6) for name in ("nats", "bpb"))
  assert of_training == of_eval


def test_an_earlier_step_does_not_take_the_place_of_a_later_one(workdir, evaluate, capsys):
  last = evaluate()
  files = workdir / "eval_validation_basic.json", workdir / "evaluations/validation_basic/eval.json"
  assert [json.loads(file.read_text()) for file in files] == [last, last]
  capsys.readouterr()
  earlier = evaluate("--step=3")
  assert earlier["step"] == 3 and earlier["bpb"] > last["bpb"]
  assert [json.loads(file.read_text()) for file in files] == [last, last]
  assert json.loads((workdir / "evaluations/validation_basic_step3/eval.json").read_text()) == earlier
  assert f"eval_validation_basic.json in {workdir} keeps the score of a later step\n" in capsys.readouterr().out
  for content in (b"[]", b"{", b"\xff", b'{"step": "x"}', json.dumps(earlier).encode()):  # whose, or of the same step
    files[0].write_bytes(content)
    evaluate("--step=3")
    assert json.loads(files[0].read_text())["bpb"] == earlier["bpb"]


def test_the_best_step_takes_the_place_of_a_later_one(workdir, evaluate):
  evaluate()
  best = evaluate("--step=best")
  assert json.loads((workdir / "eval_validation_basic.json").read_text()) == best


def test_a_run_that_ends_replaces_the_score_of_another_that_lay_there(workdir):
  file = workdir / "eval_validation_basic.json"
  file.write_text('{"step": 1000, "bpb": 0.1}')
  train.train(load_config(workdir), str(workdir))
  assert json.loads(file.read_text())["step"] == 6


def test_a_score_that_cannot_be_kept_does_not_end_a_run(workdir, monkeypatch, capsys):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(kept, "write_score", full)
  train.train(load_config(workdir), str(workdir))
  assert f"warning: the score is not kept in {workdir}: No space left on device" in capsys.readouterr().err


def test_other_bytes_of_a_split_do_not_take_the_place_of_its_score(workdir, evaluate):
  evaluate()
  file = workdir / "eval_validation_basic.json"
  before = file.read_text()
  assert evaluate("--raw")["split"] == "validation"
  assert file.read_text() == before


def test_pictures_beside_the_newest_result_are_its_own(workdir, evaluate):
  evaluate()
  old = workdir / "images_best.png"
  old.write_text("of an evaluation of images")
  evaluate()
  assert not old.exists() and (workdir / "eval_positions.json").exists()


def test_names_of_data_do_not_depend_on_the_current_folder(tmp_path, monkeypatch):
  specs = ("tfds:x/y:test", "gs://bucket/a", "hf:a/b", str(tmp_path))
  before = [kept.name_of_data(spec) for spec in specs]
  monkeypatch.chdir(tmp_path)
  assert [kept.name_of_data(spec) for spec in specs] == before


def test_pictures_are_named_and_have_titles(workdir, folder, evaluate, drawn, capsys):
  evaluate("--data", folder / "validation" / "a.txt")
  [kept] = (workdir / "evaluations").glob("a.txt-*_basic")
  said = capsys.readouterr().out.splitlines()
  assert f"pictures: {kept}/eval_by_context.png {kept}/eval_by_patch.png" in said
  path = str(folder / "validation" / "a.txt")
  title = f"Loss by position: {'...' * (len(path) > 40)}{path[-40:]}, step 6"
  assert drawn == {"eval_by_context.png": title, "eval_by_patch.png": title}


def test_any_name_of_data_can_be_a_title(tmp_path, recwarn):
  zeros, ones = np.zeros(1), np.ones(8)
  result = Evaluation("basic", zeros, zeros, ones, ones, np.ones(4), np.ones(4))
  write_positions(str(tmp_path), result, of="a $x_{ \u4e2d \udcff, step 1")
  assert (tmp_path / "eval_by_context.png").read_bytes()[:4] == b"\x89PNG" and not recwarn.list


def test_the_mean_beside_the_curve_is_that_of_the_table(tmp_path, monkeypatch):
  """Positions count as often as bytes were scored there; 2 bits at one byte and 1 at three are 1.25 on average."""
  marked = []
  monkeypatch.setattr("matplotlib.axes.Axes.annotate", lambda _, text, *__, **___: marked.append(text))
  zeros, bits = np.zeros(1), np.array([3.0, 2.0, 0.0]) * np.log(2)
  counts = np.array([3, 1, 0])
  write_positions(str(tmp_path), Evaluation("basic", zeros, zeros, bits, counts, bits, counts))
  assert marked == ["mean 1.250"] * 2


def test_the_cost_is_that_of_these_documents(workdir, folder, evaluate, tmp_path):
  short = tmp_path / "short"
  short.mkdir()
  for name in "ab":
    (short / name).write_bytes((folder / "train.txt").read_bytes()[:32])  # one context
  costs = (
    ("sliding", short, 1),
    ("sliding", folder / "train.txt", 1.998),
    ("basic", short, 1),
    ("strided", short, 1.938),
  )
  for method, data, cost in costs:
    assert evaluate(f"--method={method}", f"--data={data}")["cost"] == pytest.approx(cost, abs=1e-3), (method, data)


def test_an_exported_model_comes_without_its_data(workdir, tmp_path):
  model, config, step = load(str(workdir))
  config = dataclasses.replace(config, data=DataConfig(train="corpora/x", validation="corpora/y"))
  export_model(str(tmp_path / "model"), config, command.nnx.to_pure_dict(command.nnx.state(model)), step)
  with pytest.raises(ConfigError) as error:
    command.main([f"--workdir={tmp_path / 'model'}"])
  assert str(error.value) == f"{tmp_path / 'model'} comes without its data (corpora/y); give --data=FILE_OR_FOLDER"


def test_data_that_are_trained_on_are_told(folder, evaluate, capsys):
  evaluate("--data", folder / "train.txt", "--max-bytes=50")
  assert f"notice  {folder}/train.txt is trained on, too; its score" in capsys.readouterr().out
  evaluate()
  assert "is trained on" not in capsys.readouterr().out


def test_a_file_of_nats_is_kept_unless_it_may_be_lost(workdir, evaluate, tmp_path):
  file = tmp_path / "nats.npy"
  file.write_text("precious")
  with pytest.raises(ConfigError, match=r"--per-byte-out=.*nats\.npy exists; name another file, or give --force"):
    evaluate("--per-byte-out", file)
  assert file.read_text() == "precious"
  evaluate("--per-byte-out", file, "--force")
  assert np.load(file).shape == (1000,)
  with pytest.raises(ConfigError, match="--force is for --per-byte-out"):
    evaluate("--force")


@pytest.mark.parametrize(("steps", "told"), [(4, False), (3, True)])
def test_a_validation_text_that_takes_longer_than_training_is_told(folder, steps, told):
  config = Config.from_dict(tiny_config.get_config())  # 256 bytes a step
  data = DataConfig(train=str(folder / "train.txt"), validation=str(folder / "validation"))
  config = dataclasses.replace(config, data=data, num_steps=steps)
  source, validation = (open_source(config.data, split) for split in ("train", "validation"))
  said = [text for text in report.notices(config, source, validation) if "after the last step" in text]
  assert bool(said) == told
  if told:
    assert said == [
      f"all 1,000 bytes of {folder}/validation are scored after the last step, more than the 768 that the run trains "
      "on; --config.data.validation=FILE takes a smaller text"
    ]
