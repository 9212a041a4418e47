"""Names of changed rows, and what each change does."""

import pytest

from megabyte_jax.errors import ConfigError
from megabyte_jax.paper import recipe
from megabyte_jax.paper.rows_by_name import config_of


def test_names():
  assert recipe.split_name("table2:books_megabyte") == ("table2:books_megabyte", ())
  assert recipe.split_name("a:b+modern") == ("a:b", recipe.MODERN)
  assert recipe.split_name("a:b+swiglu+muon") == ("a:b", ("swiglu", "muon"))
  without = tuple(change for change in recipe.MODERN if change != "muon")
  assert recipe.split_name("a:b+modern-muon") == ("a:b", without)
  assert recipe.split_name("a:b+modern-muon+no_dropout") == ("a:b", (*without, "no_dropout"))
  assert recipe.split_name("a:b+muon+modern") == ("a:b", ("muon", *without))


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("a:b+moern", r"there is no moern to add; write a:b\+CHANGE, with CHANGE one of modern, scaled, rmsnorm, swiglu"),
    ("a:b+modern-wsd", r"there is no wsd to take away"),
    ("a:b-muon", r"there is no muon to take away"),
  ],
)
def test_names_of_what_is_not_there(name, message):
  with pytest.raises(ConfigError, match=message):
    recipe.split_name(name)


@pytest.mark.parametrize("row", ["table2:books_megabyte", "table2:books_perceiver_ar"])
def test_each_change_is_one(row):
  config = config_of(row)
  changed = [recipe.with_changes(config, (change,)) for change in recipe.CHANGES]
  assert len({config, *changed}) == 1 + len(recipe.CHANGES)


def test_scaled():
  """SpaceByte's rule: AdamW with initial values and rates scaled by width; changes may come in any order."""
  assert recipe.split_name("a:b+scaled") == ("a:b", recipe.SCALED)
  config = recipe.with_changes(config_of("table2:books_megabyte"), recipe.SCALED)
  model, optimizer = config.model, config.optimizer
  assert (model.init, model.embedding_std, model.tied_output, model.logit_scale) == ("fan_in", 1.0, False, "one")
  assert (model.norm, model.bias, model.qk_norm, model.activation) == ("layernorm", False, True, "relu")
  assert (optimizer.name, optimizer.matrix_rate, optimizer.learning_rate) == ("adamw", "fan_in", 0.04)
  assert (optimizer.weight_decay, optimizer.schedule) == (0.01, "half_cosine")
  for changes in (("own_output", "unit_embeddings"), ("unit_embeddings", "own_output")):
    other = recipe.with_changes(config_of("table2:books_megabyte"), changes).model
    assert (other.embedding_std, other.tied_output, other.logit_scale) == (1.0, False, "one")


def test_modern():
  config = recipe.with_changes(config_of("table2:books_megabyte"), recipe.MODERN)
  model = config.model
  assert (model.norm, model.bias, model.activation, model.qk_norm) == ("rmsnorm", False, "swiglu", True)
  assert all(level.rotary for level in model.levels)
  assert config.optimizer.name == "muon" and config.optimizer.schedule == "linear"
