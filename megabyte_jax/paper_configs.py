"""The rows of the paper's tables as configs, by the names that commands take: `table5:image640_megabyte`."""

from __future__ import annotations

import functools
import pathlib
import runpy

from megabyte_jax.config import Config
from megabyte_jax.config_parsing import require

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "paper"


@functools.cache
def rows_of_file(table: str) -> dict[str, Config]:
  """All rows of configs/paper/TABLE.py by name; raises ConfigError where the package lies outside a clone."""
  path = CONFIGS / f"{table}.py"
  require(CONFIGS.is_dir(), f"{CONFIGS} does not exist; the paper's rows are read from a clone of the repository")
  files = sorted(file.stem for file in CONFIGS.glob("*.py"))
  require(path.exists(), f"there is no table {table!r} in configs/paper; take one of {', '.join(files)}")
  return runpy.run_path(str(path))["ROWS"]


def config_of(reference: str) -> Config:
  """The config that `table5:image640_megabyte` names."""
  table, _, name = reference.partition(":")
  rows = rows_of_file(table)
  require(name in rows, f"no row {name!r} in {table}; take one of {', '.join(rows)}")
  return rows[name]


def all_rows() -> dict[str, Config]:
  """Every row that can be run, by its reference: those of the paper and a few beside them."""
  files = sorted(path.stem for path in CONFIGS.glob("*.py"))
  return {f"{file}:{name}": config for file in files for name, config in rows_of_file(file).items()}
