import dataclasses
import json

import pytest

from megabyte_jax.checkpoints.saved_config import (
  changed_keys,
  check_same_run,
  check_saved_config,
  load_config,
  save_config,
)
from megabyte_jax.config import Config, DataConfig, Level, MegabyteConfig, MeshConfig, OptimizerConfig
from megabyte_jax.errors import CheckpointError


def make_config(model=(), **kwargs):
  levels = (
    Level(patch_size=4, width=32, num_layers=1, num_heads=2),
    Level(patch_size=1, width=16, num_layers=1, num_heads=2),
  )
  model = MegabyteConfig(**{"context": 64, "levels": levels, **dict(model)})
  return Config(**{"model": model, "batch_size": 8, "num_steps": 100, **kwargs})


CONFIG = make_config()


def saved_by_json(config):
  return json.loads(json.dumps(config.to_dict()))


def test_a_config_comes_back(tmp_path):
  config = make_config(seed=3, profile_steps=(2, 5), data=DataConfig(train="a,b", train_weights=(1.0, 2.0)))
  save_config(tmp_path / "new", config)
  assert load_config(tmp_path / "new") == config
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


def test_folders_without_a_readable_config(tmp_path):
  with pytest.raises(CheckpointError, match=r"holds no run: .*config\.json does not exist; give"):
    load_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
    load_config(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "sead": 1}))
  with pytest.raises(CheckpointError, match=r"config\.json does not fit .*config\.sead; did you mean config\.seed"):
    load_config(tmp_path)


@pytest.mark.parametrize(
  "change",
  [
    {"mesh": MeshConfig(fsdp=2)},
    {"log_every": 1, "sample_bytes": 9, "profile_steps": (1, 2)},
    {"model": {"attention": "xla", "remat": "full", "scan_layers": "always"}},
    {"data": DataConfig(train="the same files elsewhere", test="x", tfds_dir="y")},
  ],
)
def test_what_does_not_matter_for_continuing(change):
  assert changed_keys(saved_by_json(CONFIG), make_config(**change).to_dict()) == []


def test_what_matters_for_continuing():
  levels = (CONFIG.model.levels[0], dataclasses.replace(CONFIG.model.levels[1], conv_filters=(3, 5), num_layers=2))
  other = make_config(
    {"levels": levels, "dropout": 0.0},
    batch_size=4,
    accumulate=2,
    num_steps=7,
    seed=1,
    optimizer=OptimizerConfig(learning_rate=1.0),
    data=DataConfig(validation="x"),
  )
  keys = ["accumulate", "batch_size", "data.validation", "model.dropout", "model.levels[1].conv_filters"]
  keys += ["model.levels[1].num_layers", "num_steps", "optimizer.learning_rate", "seed"]
  assert changed_keys(saved_by_json(CONFIG), other.to_dict()) == keys


def test_keys_that_an_older_version_did_not_write_count_as_defaults():
  saved = saved_by_json(CONFIG)
  del saved["optimizer"]["eps"], saved["model"]["levels"][0]["rotary"], saved["data"]["form"]
  assert changed_keys(saved, CONFIG.to_dict()) == []
  levels = (dataclasses.replace(CONFIG.model.levels[0], rotary=True), CONFIG.model.levels[1])
  other = make_config({"levels": levels}, optimizer=OptimizerConfig(eps=1e-6))
  assert changed_keys(saved, other.to_dict()) == ["model.levels[0].rotary", "optimizer.eps"]


def test_keys_that_a_version_no_longer_has_differ():
  saved = saved_by_json(CONFIG)
  saved["optimizer"]["amsgrad"] = True
  assert changed_keys(saved, CONFIG.to_dict()) == ["optimizer.amsgrad"]


def test_another_number_of_levels_differs():
  assert "model.levels[1].width" in changed_keys(
    CONFIG.to_dict(), make_config({"levels": CONFIG.model.levels[:1]}).to_dict()
  )


def test_a_run_is_continued_only_with_its_config_and_data():
  meta = {"config": saved_by_json(CONFIG), "fingerprint": {"train": "a1", "bytes": 10}, "step": 50}
  check_same_run(meta, CONFIG.to_dict(), {"train": "a1", "bytes": 10})
  with pytest.raises(CheckpointError) as error:
    check_same_run(meta, make_config(seed=2).to_dict(), {"train": "b2", "bytes": 10}, workdir="runs/mine")
  message = str(error.value)
  assert "step 50 in runs/mine belongs to another run" in message
  assert "seed: 0 -> 2" in message and "data.train: the files in sample:text/train have changed" in message
  assert "--workdir" in message and "--init_from=DIR" in message
  with pytest.raises(CheckpointError, match=r'data\.train: "sample:text/train" -> "elsewhere", which hold different'):
    other = make_config(data=DataConfig(train="elsewhere"))
    check_same_run(meta, other.to_dict(), {"train": "b2", "bytes": 10})


def test_files_that_have_changed_are_told_in_words():
  meta = {"config": saved_by_json(CONFIG), "fingerprint": "t1", "validation_fingerprint": "v1"}
  with pytest.raises(CheckpointError) as error:
    check_same_run(meta, CONFIG.to_dict(), "t2", "v1", workdir="runs/mine")
  assert str(error.value) == (
    "the files in sample:text/train have changed since the run in runs/mine began (one was added, removed, renamed or "
    "edited); put them back, or start a new run, e.g. with --workdir=NEW --init_from=runs/mine"
  )
  with pytest.raises(CheckpointError, match="files in sample:text/train and sample:text/validation have changed since"):
    check_same_run(meta, CONFIG.to_dict(), "t2", "v2")


def test_settings_that_make_other_bytes_explain_other_fingerprints():
  meta = {"config": saved_by_json(CONFIG), "fingerprint": "t1"}
  with pytest.raises(CheckpointError, match=r"data\.image_size: 64 -> 256") as error:
    check_same_run(meta, make_config(data=DataConfig(image_size=256)).to_dict(), "t2")
  assert "data.train" not in str(error.value) and "fingerprint" not in str(error.value)


def test_validation_data_count_by_their_contents_not_by_where_they_lie():
  moved = make_config(data=DataConfig(train="t", validation="elsewhere"))
  meta = {"config": saved_by_json(CONFIG), "fingerprint": "t1", "validation_fingerprint": "v1"}
  check_same_run(meta, moved.to_dict(), "t1", "v1")
  with pytest.raises(CheckpointError, match=r"^the files in sample:text/validation have changed since the run began"):
    check_same_run(meta, CONFIG.to_dict(), "t1", "v2")
  with pytest.raises(CheckpointError, match=r'data\.validation: ".*" -> "elsewhere", which hold') as error:
    check_same_run(meta, moved.to_dict(), "t1", "v2")
  assert "data.train" not in str(error.value)  # it lies elsewhere, and holds the same
  with pytest.raises(CheckpointError, match=r"data\.validation: "):
    check_same_run(meta | {"validation_fingerprint": ""}, moved.to_dict(), "t1", "v1")


@pytest.mark.parametrize("workdir", ["http://host/run", "file:///run", "ftp://run"])
def test_no_run_is_read_from_elsewhere(workdir):
  with pytest.raises(CheckpointError, match=r"no run can be read from \w+://; name a folder or a bucket"):
    load_config(workdir)


def test_a_checkpoint_that_another_run_left_is_told_by_its_seed_and_optimizer(tmp_path):
  meta = {"step": 4, "config": saved_by_json(CONFIG)}
  check_saved_config(tmp_path, make_config(num_steps=99), meta)
  other = make_config(seed=2, optimizer=OptimizerConfig(learning_rate=1.0))
  with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate: .*, seed: 0 -> 2; .* of another run"):
    check_saved_config(tmp_path, other, meta)
