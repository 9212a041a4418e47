"""Every row of the paper's tables: parses, survives saving, and has the parameters its closed form says."""

import functools
import importlib.util
import math
import pathlib
import re

import jax
import pytest

from megabyte_jax.config import Config, MegabyteConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation import perplexity
from megabyte_jax.models.build import abstract_model
from megabyte_jax.paper import rows, tables
from megabyte_jax.paper.printed_numbers import TABLES

FILES = sorted((pathlib.Path(__file__).parents[2] / "configs" / "paper").glob("*.py"))


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


MODULES = {path.stem: load(path) for path in FILES}
ROWS = [(table, name) for table, module in MODULES.items() for name in module.ROWS]


@functools.cache
def config(table, name):
  return Config.from_dict(MODULES[table].get_config(name))


@pytest.mark.parametrize("table", MODULES)
def test_the_numbers_that_a_file_quotes_are_the_papers(table):
  numbers = [value for row in TABLES[table.removeprefix("table")].rows for value in row.paper.values()]
  known = {value for value in numbers if isinstance(value, int | float)}
  if table == "table3":
    size = perplexity.PG19["test"]
    known |= {round(math.log2(value) * size.words / size.bytes, 3) for value in known}
  quoted = re.findall(r"(?<![\w.])\d+\.\d{2,4}(?![\w.])|(?<= )\d\d+\.\d(?= )", MODULES[table].__doc__)
  assert quoted and {float(number) for number in quoted} <= known


def abstract_parameter_count(model):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(model)[1]))


def test_all_tables_are_here():
  assert set(MODULES) == {*(f"table{i}" for i in (2, 3, 4, 5, 9, 10, 11, 12, 13, 16, 17)), "audio"}


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_row_parses_and_round_trips(table, name):
  row = config(table, name)
  assert row == MODULES[table].ROWS[name]
  assert Config.from_dict(row.to_dict()) == row
  assert f"{table}.py:" in MODULES[table].__doc__  # the recipe
  trained = row.num_steps * row.bytes_per_step * tables.bytes_per_token(row)
  longer = {"table4": rows.IMAGENET64_BYTES, **dict.fromkeys(("table3", "table11", "table17"), 400e9)}
  published = {"block_recurrent": 500_000 * 32 * 4096 * 4}  # steps, segments and tokens of one, 4 bytes each
  assert trained == pytest.approx(published.get(name) or longer.get(table, 80e9), rel=1e-3)


def test_parameter_counts_are_exact():
  for model in {MODULES[table].ROWS[name].model for table, name in ROWS}:
    assert abstract_parameter_count(model) == model.parameter_count(), model


@pytest.mark.parametrize("table", MODULES)
def test_missing_or_unknown_names_are_listed(table):
  names = ", ".join(MODULES[table].ROWS)
  for name in ("", "megabite"):
    with pytest.raises(ConfigError) as error:
      MODULES[table].get_config(name)
    assert names in str(error.value)


def test_widths_that_do_not_divide():
  widths = {
    ("table4", "megabyte"): (2568, 80),
    ("table5", "image64_megabyte"): (2064, 64),
    ("table10", "image256_without_local"): (4128, 128),
  }
  for (table, name), (width, head_dim) in widths.items():
    level = config(table, name).model.levels[0]
    assert (level.width, level.heads) == (width, (32, head_dim))


def test_cross_patch_attention_is_on_but_in_its_ablation():
  for table, name in ROWS:
    model = config(table, name).model
    if not isinstance(model, MegabyteConfig) or "transformer" in name or "without_local" in name:
      continue
    local, patch = model.levels[-1], model.spans[-1]
    expected = (False, 0) if "without_cross_patch" in name else (True, patch)
    assert (local.rotary, local.cross_patch) == expected, (table, name)


def test_settings_of_table_15():
  row = config("table5", "image640_megabyte")
  assert (row.model.context, row.batch_size, row.optimizer.learning_rate) == (1_228_800, 32, 3e-4)
  assert (row.data.form, row.data.image_size, row.data.scan, row.data.scan_patch) == ("image", 640, "patch", 192)
  optimizer = row.optimizer
  assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.98, 0.1, 1.0)
  assert (optimizer.warmup_steps, optimizer.end_learning_rate, row.model.dropout) == (500, 0.0, 0.1)
  assert config("table16", "megabyte_raster_scan").data.scan == "raster"
  assert config("table10", "arxiv_without_local").optimizer.learning_rate == 1.5e-4
  assert config("table11", "both").eval.method == "both"
