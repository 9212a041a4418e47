"""Defines two recipes for the paper's models: changes that later work agrees on, one by one or together.

A row's name may end with changes: `table2:books_megabyte+modern` has all of MODERN, `...+modern-muon` all but one,
`...+swiglu+muon` only these. `+scaled` is AdamW with initial values and rates scaled by width (SpaceByte's rule;
Slagle, 2024): for those who want AdamW, not as good as `+modern`. configs/recipe.py has models of free sizes for both.
configs/small.py and configs/modern.py take such names; `modern_books` and `modern_images` of benchmarks/comparisons.py
ask what each change is worth.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from megabyte_jax.config import Config
from megabyte_jax.errors import require


def _model(**changes: Any) -> Callable[[Config], Config]:
  return lambda config: dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _optimizer(**changes: Any) -> Callable[[Config], Config]:
  return lambda config: dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))


def _rotary(config: Config) -> Config:
  """Rotary positions at every level, beside the learned ones."""
  levels = tuple(dataclasses.replace(level, rotary=True) for level in config.model.levels)
  return dataclasses.replace(config, model=config.model.with_levels(levels))


def _unit_embeddings(config: Config) -> Config:
  """Tables, positions and pads of deviation 1; logits are scaled where the table gives them."""
  scale = "width" if config.model.tied_output else "one"
  return _model(embedding_std=1.0, logit_scale=scale)(config)


CHANGES: dict[str, Callable[[Config], Config]] = {
  "rmsnorm": _model(norm="rmsnorm", bias=False),
  "swiglu": _model(activation="swiglu"),
  "rotary": _rotary,
  "qk_norm": _model(qk_norm=True),
  "init": _model(init_std=0.02),
  "muon": _optimizer(name="muon"),
  "no_bias": _model(bias=False),
  "fan_in": _model(init="fan_in"),
  "unit_embeddings": _unit_embeddings,
  "own_output": _model(tied_output=False, logit_scale="one"),
  "fan_in_rates": _optimizer(matrix_rate="fan_in", learning_rate=0.04),
  "light_decay": _optimizer(weight_decay=0.01),
  "half_cosine": _optimizer(schedule="half_cosine"),
  # In neither recipe: the paper's schedule stays, and dropout is a matter of the data.
  "cosine": _optimizer(schedule="cosine"),
  "wsd": _optimizer(schedule="wsd"),
  "no_dropout": _model(dropout=0.0),
}
MODERN = ("rmsnorm", "swiglu", "rotary", "qk_norm", "init", "muon")
SCALED = (
  "no_bias",
  "rotary",
  "qk_norm",
  "fan_in",
  "unit_embeddings",
  "own_output",
  "fan_in_rates",
  "light_decay",
  "half_cosine",
)
_TOGETHER = {"modern": MODERN, "scaled": SCALED}


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
  """Splits a name such as `TABLE:ROW+modern-muon` into the row and its changes.

  Raises:
    ConfigError: there is no such change, or none to take away.
  """
  row, *parts = re.split(r"(?=[+-])", name)
  changes: list[str] = []
  for part in parts:
    meant = _TOGETHER.get(part[1:], (part[1:],))
    unknown = sorted(set(meant) - set(CHANGES if part[0] == "+" else changes))
    require(
      not unknown,
      f"{name}: there is no {' or '.join(unknown)} to {'add' if part[0] == '+' else 'take away'}; write "
      f"{row}+CHANGE, with CHANGE one of {', '.join((*_TOGETHER, *CHANGES))}, or +modern-CHANGE",
    )
    changes = (
      [*changes, *(m for m in meant if m not in changes)] if part[0] == "+" else [c for c in changes if c not in meant]
    )
  return row, tuple(changes)


def with_changes(config: Config, changes: tuple[str, ...]) -> Config:
  """Returns `config` with the named changes."""
  for change in changes:
    config = CHANGES[change](config)
  return config
