"""Looks up the rows of the paper's tables as configs, by the names that commands take: `table5:image640_megabyte`."""

from __future__ import annotations

import functools
import runpy

from megabyte_jax.config import Config
from megabyte_jax.config.parsing import require_known
from megabyte_jax.config.shipped import shipped
from megabyte_jax.errors import require

ROOT = shipped()
CONFIGS = ROOT / "configs" / "paper"


@functools.cache
def rows_of_file(table: str) -> dict[str, Config]:
  """Reads all rows of configs/paper/TABLE.py, by name.

  Raises:
    ConfigError: there is no such table, or this installation lacks them.
  """
  path = CONFIGS / f"{table}.py"
  require(CONFIGS.is_dir(), f"{CONFIGS} does not exist; install the package whole, or use a clone of the repository")
  require_known(f"table {table!r} in configs/paper", table, _tables())
  return runpy.run_path(str(path))["ROWS"]


def config_of(reference: str) -> Config:
  """Returns the config that a reference such as `table5:image640_megabyte` names.

  Raises:
    ConfigError: there is no such table or row (the message names the nearest one), or this installation lacks them.
  """
  table, _, name = reference.partition(":")
  if not name:
    meant = next((known for known in all_rows() if table in known.split(":")), "table2:books_megabyte")
    require(False, f"{reference!r} names no row; write TABLE:ROW, such as {meant} (a wrong ROW lists all of a table)")
  rows = rows_of_file(table)
  require_known(f"row {name!r} in {table}", name, rows)
  return rows[name]


def all_rows() -> dict[str, Config]:
  """Returns every row that can be run, by its reference: the paper's and a few additions of this project."""
  return {f"{table}:{name}": config for table in _tables() for name, config in rows_of_file(table).items()}


def _tables() -> list[str]:
  return sorted(path.stem for path in CONFIGS.glob("*.py"))
