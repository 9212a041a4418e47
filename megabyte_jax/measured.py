"""Our own numbers for the rows of the paper's tables: from docs/results/ and from run directories.

A results file is JSON with a list `rows`, each an object with `row` (such as `table5:image640_megabyte`), any of
the numbers that eval.py reports, and optionally `note` (what was smaller than in the paper, on what device).
A run directory has config.json and eval.json (or eval_METHOD.json); it counts for a row if its path ends
in TABLE/ROW or if its model and data are the row's.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from megabyte_jax import flops
from megabyte_jax.config import Config
from megabyte_jax.config_parsing import ConfigError, require


@dataclasses.dataclass(frozen=True)
class Measured:
  """One measurement: the row it is for, its numbers by metric, and where they came from."""

  row: str
  numbers: Mapping[str, float]
  source: str


def from_results(folder: pathlib.Path, root: pathlib.Path) -> list[Measured]:
  """What the results files in `folder` hold, other JSON aside; `source` names them relative to `root`."""
  found = []
  for path in sorted(folder.glob("**/*.json")):
    content = _read(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    for entry in rows if isinstance(rows, list) else []:
      if isinstance(entry, dict) and "row" in entry:
        note = f" ({entry['note']})" if entry.get("note") else ""
        found.append(Measured(entry["row"], _numbers(entry), f"{_relative(path, root)}{note}"))
  return found


def from_runs(folder: pathlib.Path, rows: Mapping[str, Config]) -> list[Measured]:
  """What the run directories under `folder` (or `folder` itself) hold for the given rows."""
  require(folder.is_dir(), f"--runs={folder} is not a folder; name one that holds run directories of train.py")
  found = []
  for path in sorted(folder.glob("**/eval*.json")):
    config_path = path.parent / "config.json"
    content = _read(path)
    if not config_path.exists() or not isinstance(content, dict) or "bpb" not in content:
      continue
    try:
      config = Config.from_dict(_read(config_path))
    except ConfigError as error:
      raise ConfigError(f"{config_path} does not fit this version of megabyte_jax: {error}") from error
    for name in _rows_of(path.parent, config, content.get("method"), rows):
      smaller = config.model != rows[name].model
      size = f" ({flops.parameter_count(config.model) / 1e6:.3g}M parameters)" if smaller else ""
      found.append(Measured(name, _numbers({"split": _split(content, config)} | content), f"{path}{size}"))
  return found


def _rows_of(run: pathlib.Path, config: Config, method: str | None, rows: Mapping[str, Config]) -> list[str]:
  """Names of the rows that a run belongs to."""
  named = ":".join(run.resolve().parts[-2:])
  if named in rows:
    return [named]
  same = [name for name, row in rows.items() if (row.model, row.data) == (config.model, config.data)]
  return [name for name in same if method is None or rows[name].eval.method == method]


def _split(content: Mapping[str, Any], config: Config) -> str:
  """The split whose data was evaluated; other data is nobody's."""
  splits = ("test", "validation", "train")
  return next((split for split in splits if content.get("data") == getattr(config.data, split)), "other")


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
  """The numeric entries; a word-level perplexity is named after the split it was measured on."""
  numbers = {key: value for key, value in entry.items() if isinstance(value, int | float)}
  if "word_perplexity" in numbers:
    numbers[f"perplexity_{entry.get('split', 'validation')}"] = numbers["word_perplexity"]
  return numbers


def _read(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path} is not JSON ({error}); repair or remove it") from error


def _relative(path: pathlib.Path, root: pathlib.Path) -> str:
  return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
