"""configs/recipe.py: sizes by name, with a recipe, and equal bytes a step for all."""

import runpy

import pytest

from megabyte_jax.config import Config, MegabyteConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.paper.rows_by_name import ROOT

get_config = runpy.run_path(str(ROOT / "configs/recipe.py"))["get_config"]


@pytest.mark.parametrize(
  ("name", "context", "shapes"),
  [
    ("megabyte:8:768x8:384x6", 4096, [(8, 768, 8, 12), (1, 384, 6, 6)]),
    ("transformer:320x6", 1024, [(1, 320, 6, 5)]),
    ("windowed:384x5", 4096, [(1, 384, 5, 6)]),
    ("perceiver:384x4", 4096, [(1, 384, 4, 6)]),
  ],
)
def test_sizes_and_equal_bytes_a_step(name, context, shapes):
  config = Config.from_dict(get_config(f"{name}+modern"))
  assert config.model.context == context
  assert [(x.patch_size, x.width, x.num_layers, x.num_heads) for x in config.model.levels] == shapes
  assert all(level.rotary and level.cross_patch == 0 for level in config.model.levels)
  assert config.bytes_per_step == 2**18
  assert (config.model.norm, config.model.init_std, config.optimizer.name) == ("rmsnorm", 0.04, "muon")
  windows = [level.attention_window for level in config.model.levels]
  assert windows == ([512] if name.startswith("windowed") else [0] * len(shapes))


def test_contexts_are_whole_patches():
  config = Config.from_dict(get_config("megabyte:12:576x6:256x6+modern"))
  assert (config.model.context, config.model.levels[0].patch_size) == (4092, 12)


def test_adamw_recipe():
  config = Config.from_dict(get_config("megabyte:4:256x2:128x2+scaled"))
  assert isinstance(config.model, MegabyteConfig) and config.model.init == "fan_in"
  assert (config.optimizer.matrix_rate, config.optimizer.learning_rate) == ("fan_in", 0.04)


@pytest.mark.parametrize("name", ["perceiver:100x2", "perceiver:32x2", "transformer:0x2", "megabyte:4:768x2:100x2"])
def test_widths_are_whole_heads(name):
  with pytest.raises(ConfigError, match="widths must be multiples of 64"):
    get_config(name)


@pytest.mark.parametrize("name", ["megabyte:768x8:384x8", "megabyte:8:768x8", "transformer:8:768x8", "gpt:768x8", ""])
def test_names_of_nothing(name):
  with pytest.raises(ConfigError, match="write megabyte:P:WIDTHxLAYERS:WIDTHxLAYERS"):
    get_config(name)
