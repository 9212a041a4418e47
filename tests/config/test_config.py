"""Config files, their dataclasses, and what is said about values that cannot be."""

import importlib.util
import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
import tiny_config

from megabyte_jax.config import Config, DataConfig, Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.parallel.sharding import check_mesh, make_mesh
from megabyte_jax.training.state import abstract_state

FILES = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_files_parse_round_trip_and_build(path):
  values = load(path).get_config()
  config = Config.from_dict(values)
  assert isinstance(values, ml_collections.ConfigDict) and values.is_locked
  assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  assert Config.from_dict(config.to_config_dict()) == config
  state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:1]))
  assert state.step.shape == ()


@pytest.mark.parametrize("path", [path for path in FILES if "quickstart" in path.stem], ids=lambda path: path.stem)
def test_quick_starts_run_on_several_devices(path):
  config = Config.from_dict(load(path).get_config())
  check_mesh(make_mesh(config.mesh), config.model, config.batch_size // config.accumulate)


def test_there_is_a_quick_start():
  assert "quickstart" in [path.stem for path in FILES]


PERCEIVER = {
  "family": "perceiver_ar",
  "context": 8,
  "latents": 4,
  "width": 8,
  "num_layers": 1,
  "num_heads": 1,
}


def test_the_family_of_a_model_is_told_by_its_name():
  values = Config.from_dict(tiny_config.get_config()).to_dict() | {"model": PERCEIVER}
  assert isinstance(Config.from_dict(values).model, PerceiverARConfig)
  values["model"] = {key: value for key, value in PERCEIVER.items() if key != "family"}
  with pytest.raises(ConfigError, match=r"unknown key config\.model\.latents"):  # MEGABYTE is what is meant then
    Config.from_dict(values)


def changed(path, value):
  values = json.loads(json.dumps(Config.from_dict(tiny_config.get_config()).to_dict()))
  *groups, key = path
  inner = values
  for group in groups:
    inner = inner[group]
  inner[key] = value
  return values


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    (["batch_sise"], 4, r"unknown key config\.batch_sise; did you mean config\.batch_size\?"),
    (["zzz"], 4, r"unknown key config\.zzz; known keys: model, data"),
    (["model", "levels", 1, "num_head"], 4, r"config\.model\.levels\[1\]\.num_head; did you mean .*num_heads"),
    (["data", "trian"], "x", r"config\.data\.trian; did you mean config\.data\.train\?"),
    (["batch_size"], "4", r"config\.batch_size must be a whole number, not '4'"),
    (["batch_size"], 4.0, r"config\.batch_size must be a whole number, not 4\.0"),
    (["batch_size"], True, r"config\.batch_size must be a whole number, not True"),
    (["batch_size"], 0, r"batch_size is 0; it must be at least 1"),
    (["accumulate"], 3, r"accumulate 3 does not divide batch_size 8; 2 would"),
    (["log_every"], 0, r"log_every is 0"),
    (["profile_steps"], [1], r"profile_steps is \(1,\); give \(first, last\)"),
    (["profile_steps"], [5, 3], r"profile_steps is \(5, 3\); give \(first, last\), counted from 1"),
    (["seed"], -1, r"seed is -1; it must be between 0 and 4294967295"),
    (["data", "image_size"], 0, r"data\.image_size is 0; it must be at least 1"),
    (["data", "image_tiles"], -1, r"data\.image_tiles is -1; it must not be negative"),
    (["sample_bytes"], -5, r"sample_bytes is -5; it must not be negative"),
    (["eval", "max_bytes"], -5, r"eval\.max_bytes is -5; it must not be negative"),
    (["optimizer", "b1"], 1.0, r"optimizer\.b1 is 1\.0; it must be in \[0, 1\)"),
    (["data", "form"], "video", r"config\.data\.form is 'video'; choose one of 'bytes', 'image', 'audio'"),
    (["data", "skip_bad"], 1, r"config\.data\.skip_bad must be True or False"),
    (["model"], 3, r"config\.model must be a group of keys, not 3"),
    (["model", "family"], "gpt", r"config\.model\.family is 'gpt'; choose one of .*'megabyte', 'perceiver_ar'"),
    (["model", "context"], 30, r"model\.levels\[0\]\.patch_size 4 does not divide the 30 bytes"),
    (["model", "levels"], [], r"model\.levels is empty"),
    (["model", "levels"], 7, r"config\.model\.levels must be a tuple"),
    (["model", "levels", 1, "patch_size"], 3, r"levels\[1\]\.width 16 is not a multiple of patch_size 3.*15 or 18"),
    (["model", "levels", 1, "patch_size"], 4, r"levels\[1\]\.patch_size 4 must be smaller than the 4 of the level"),
    (["model", "levels", 0, "num_heads"], 5, r"levels\[0\]\.width 32 is not a multiple of num_heads 5; set .*head_dim"),
    (["model", "levels", 0, "cross_patch"], 1, r"the first level has no previous span"),
    (["model", "levels", 1, "cross_patch"], 2, r"levels\[1\]\.cross_patch needs .*rotary=True"),
    (["model", "dropout"], 1.0, r"model\.dropout is 1\.0; it must be in \[0, 1\)"),
    (["model", "vocab_size"], 257, r"bytes have 1 to 256 values"),
    (["optimizer", "learning_rate"], 0, r"optimizer\.learning_rate is 0\.0; it must be positive"),
    (["optimizer", "learning_rate"], float("inf"), r"optimizer\.learning_rate is inf; it must be finite"),
    (["optimizer", "weight_decay"], float("nan"), r"optimizer\.weight_decay is nan; it must be finite"),
    (["optimizer", "end_learning_rate"], float("inf"), r"optimizer\.end_learning_rate is inf; it must be finite"),
    (["model", "init_std"], float("inf"), r"model\.init_std is inf; it must be positive and finite"),
    (["optimizer", "name"], "sgd", r"config\.optimizer\.name is 'sgd'; choose one of 'adamw', 'muon'"),
    (
      ["optimizer", "schedule"],
      "step",
      r"optimizer\.schedule is 'step'; choose one of 'linear', 'cosine', 'half_cosine', 'wsd', 'constant'",
    ),
    (["optimizer", "embedding_rate"], 0, r"optimizer\.embedding_rate is 0\.0; it must be positive"),
    (["optimizer", "level_rates"], (1.0, 0.0), r"optimizer\.level_rates is \(1\.0, 0\.0\); each must be positive"),
    (["optimizer", "level_rates"], (1.0,), r"optimizer\.level_rates has 1 factors; the model has 2 levels"),
    (["optimizer"], {"name": "muon", "matrix_rate": "fan_in"}, r"optimizer\.matrix_rate=fan_in is for adamw"),
    (["model", "init"], "xavier", r"config\.model\.init is 'xavier'; choose one of 'paper', 'fan_in'"),
    (["model", "embedding_std"], -1, r"model\.embedding_std is -1\.0; it must not be negative"),
    (["optimizer", "decay_share"], 0, r"optimizer\.decay_share is 0\.0; it must be in \(0, 1\]"),
    (["optimizer", "momentum"], 1, r"optimizer\.momentum is 1\.0; it must be in \[0, 1\)"),
    (["model", "activation"], "geglu", r"config\.model\.activation is 'geglu'; choose one of 'relu', .*'swiglu'"),
    (["model", "qk_norm"], 1, r"config\.model\.qk_norm must be True or False, not 1"),
    (
      ["checkpoint", "keep_best"],
      1,
      r"checkpoint\.keep_best needs evaluations .*: set eval\.every_steps and data\.val",
    ),
    (["checkpoint", "keep"], 0, r"checkpoint\.keep is 0; keep at least 1"),
    (["mesh"], {"data": -1, "fsdp": -1}, r"mesh sizes \(-1, -1, 1, 1\) must be at least 1, and at most one of them -1"),
    (["mesh", "seq"], 0, r"mesh sizes"),
  ],
)
def test_what_cannot_be_is_one_line_that_names_the_key(path, value, message):
  with pytest.raises(ConfigError, match=message) as error:
    Config.from_dict(changed(path, value))
  assert "\n" not in str(error.value)


def test_the_usual_width_of_feed_forward_layers():
  def hidden(width, activation, ff_width=0):
    level = Level(patch_size=1, width=width, num_layers=1, num_heads=1, ff_width=ff_width)
    return MegabyteConfig(context=8, levels=(level,), activation=activation).hidden(level)

  assert [hidden(width, "relu") for width in (8, 1024)] == [32, 4096]
  assert [hidden(width, "swiglu") for width in (1, 8, 384, 512, 1024, 2048)] == [8, 24, 1024, 1408, 2688, 5504]
  assert hidden(512, "swiglu", ff_width=100) == hidden(512, "relu", ff_width=100) == 100


def test_whole_numbers_do_where_fractions_are_meant():
  config = Config.from_dict(changed(["optimizer", "learning_rate"], 1))
  assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)


def test_missing_keys():
  values = tiny_config.get_config().to_dict()
  del values["batch_size"]
  with pytest.raises(ConfigError, match=r"config\.batch_size is missing"):
    Config.from_dict(values)


def test_splits():
  data = DataConfig(train="a", validation="b")
  assert (data.source("train"), data.source("validation")) == ("a", "b")
  with pytest.raises(ConfigError, match=r"config\.data\.test is empty; name a file"):
    data.source("test")
  with pytest.raises(ConfigError, match=r"split 'dev' is unknown; take train, validation or test"):
    data.source("dev")


def test_configs_are_frozen_and_can_be_keys():
  level = Level(patch_size=1, width=8, num_layers=1, num_heads=1)
  one, other = (MegabyteConfig(context=8, levels=(level,)) for _ in range(2))
  assert {one: 1}[other] == 1
  with pytest.raises(AttributeError):
    one.context = 4


def test_lists_and_numbers_of_numpy_are_converted():
  """As notebooks and sweeps make them: such configs can be hashed, compared and saved."""
  levels = [{"patch_size": 4, "width": 32, "num_layers": 1, "num_heads": 2}]
  made = MegabyteConfig(
    context=np.int64(32), levels=[Level(**{name: np.int32(n) for name, n in levels[0].items()})], dropout=np.float32(0)
  )
  plain = MegabyteConfig(context=32, levels=(Level(**levels[0]),), dropout=0.0)
  assert made == plain and hash(made) == hash(plain)
  assert type(made.context) is int and type(made.levels) is tuple and type(made.dropout) is float
  config = Config(model=made, batch_size=np.int64(8), num_steps=np.array(3), data=DataConfig(convert_images=np.True_))
  assert json.loads(json.dumps(config.to_dict()))["batch_size"] == 8
  assert config.data.convert_images is True
  assert Level(**levels[0] | {"conv_filters": np.array([3, 5])}).conv_filters == (3, 5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: Level(patch_size="4", width=32, num_layers=1, num_heads=2),
      "Level.patch_size must be a whole number, not",
    ),
    (
      lambda: Level(patch_size=4.5, width=32, num_layers=1, num_heads=2),
      "Level.patch_size must be a whole number, not",
    ),
    (lambda: MegabyteConfig(context=32, levels=Level), "MegabyteConfig.levels must be a tuple"),
    (lambda: MegabyteConfig(context=32, levels=[3]), r"MegabyteConfig.levels\[0\] must be a group of keys, not 3"),
    (lambda: DataConfig(train=3), "DataConfig.train must be text, not 3"),
  ],
)
def test_values_of_another_type_are_named(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
