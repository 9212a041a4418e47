"""configs/small.py: what its one rule promises, for every row."""

import functools
import runpy

import pytest

from megabyte_jax.config import Config, MegabyteConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.paper.rows_by_name import ROOT, all_rows, config_of

SMALL = runpy.run_path(str(ROOT / "configs/small.py"))
ROWS = list(all_rows())


@functools.cache
def small(row):
  return Config.from_dict(SMALL["get_config"](row))


@pytest.mark.parametrize("row", ROWS)
def test_half_as_wide_and_deep_and_everything_else_as_it_was(row):
  paper, config = config_of(row), small(row)
  assert config.model.context == paper.model.context and config.data == paper.data
  assert config.eval.method == paper.eval.method
  of = (paper.model, config.model)
  levels = [model.levels if isinstance(model, MegabyteConfig) else (model.level,) for model in of]
  for before, now in zip(*levels, strict=True):
    assert now.patch_size == before.patch_size and now.cross_patch == before.cross_patch
    assert now.num_layers == (before.num_layers + 1) // 2
    assert before.width / 2 <= now.width < before.width / 2 + max(8, 8 * before.patch_size)
    assert now.heads[1] == before.heads[1]


def test_other_sizes():
  whole, quarter = small("table2:books_megabyte@1").model.levels, small("table2:books_megabyte@4+swiglu").model.levels
  shapes = [(level.width, level.num_layers, level.num_heads, level.heads[1]) for level in whole]
  paper = config_of("table2:books_megabyte").model.levels
  assert shapes == [(level.width, level.num_layers, level.num_heads, level.heads[1]) for level in paper]
  assert [(level.width, level.num_layers, level.num_heads, level.heads[1]) for level in quarter] == [
    (512, 4, 8, 64),
    (256, 5, 4, 64),
  ]
  with pytest.raises(ConfigError, match="@3 is none of @1, @2, @4 and @8"):
    small("table2:books_megabyte@3")


def test_changes_of_the_recipe_come_before_the_rule():
  modern, plain = small("table2:books_megabyte+modern"), small("table2:books_megabyte")
  assert modern.model.init_std == plain.model.init_std == SMALL["INIT_STD"]
  assert modern.model.activation == "swiglu" and modern.optimizer.name == "muon"
  assert modern.optimizer.warmup_steps == plain.optimizer.warmup_steps
  assert all(level.rotary for level in (*modern.model.levels, *plain.model.levels))


@pytest.mark.parametrize(
  "group", ["table2:books_", "table2:arxiv_", "table5:image64_", "table5:image256_", "table5:image640_", "audio:"]
)
def test_rows_of_a_data_set_are_updated_equally_often_on_equally_many_bytes(group):
  configs = [small(row) for row in ROWS if row.startswith(group)]
  assert len(configs) >= 3
  assert len({config.bytes_per_step for config in configs}) == 1
  assert len({config.num_steps for config in configs}) == 1


@pytest.mark.parametrize("row", ROWS)
def test_parts_of_a_batch_are_of_bounded_size(row):
  config = small(row)
  at_once = config.batch_size // config.accumulate
  assert at_once == 1 or at_once * config.model.predicted_bytes <= SMALL["BYTES_AT_ONCE"]
