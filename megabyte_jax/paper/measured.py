"""Collects our own measurements for the rows of the paper's tables, from docs/results/ and from run directories.

A results file is JSON with a list `rows`. Each entry is an object with `row` (such as `table5:image640_megabyte`), any
of the numbers that eval.py reports, and optionally `note` (what was smaller than in the paper, and the device).
A run directory has config.json and an eval_SPLIT_METHOD.json for each whole split that was scored. Such an
evaluation counts for a row with the same method if the path ends in TABLE/ROW, or if model and data are the row's. All
other differences from the row are listed beside its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from megabyte_jax.checkpoints.saved_config import CONFIG_FILE, changed_keys, load_config
from megabyte_jax.config import Config
from megabyte_jax.display.progress import human
from megabyte_jax.errors import ConfigError, require
from megabyte_jax.evaluation import windows


@dataclasses.dataclass(frozen=True)
class Measured:
  """One measurement.

  Attributes:
    row: reference of the row, such as `table5:image640_megabyte`.
    numbers: the values, by metric.
    source: the file that holds them.
    note: differences from the row; runs of a row with equal notes differ in their seeds at most.
    split: the split that was scored, if known.
  """

  row: str
  numbers: Mapping[str, float]
  source: str
  note: str = ""
  split: str = ""


def from_results(folder: pathlib.Path, root: pathlib.Path) -> list[Measured]:
  """Reads the results files in `folder` and skips other JSON; `source` is relative to `root`.

  Raises:
    ConfigError: a file is not valid JSON.
  """
  found = []
  for path in sorted(folder.glob("**/*.json")):
    content = _read(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    for entry in rows if isinstance(rows, list) else []:
      if isinstance(entry, dict) and "row" in entry:
        note, split = entry.get("note", ""), entry.get("split", "")
        found.append(Measured(entry["row"], _numbers(entry), _relative(path, root), note, split))
  return found


def from_runs(folder: pathlib.Path, rows: Mapping[str, Config]) -> list[Measured]:
  """Reads the evaluations of the given rows from the run directories under `folder`, or from `folder` itself.

  Raises:
    ConfigError: `folder` is not a folder, or an evaluation in it is not valid JSON.
    CheckpointError: the config beside an evaluation cannot be read.
  """
  require(folder.is_dir(), f"--runs={folder} is not a folder; name one that holds run directories of train.py")
  found = []
  for path in sorted(folder.glob("**/eval_*_*.json")):
    content = _read(path)
    if not (path.parent / CONFIG_FILE).exists() or not isinstance(content, dict) or "bpb" not in content:
      continue
    config = load_config(path.parent)
    name = _row_of(path.parent, config, content.get("method"), rows)
    if name:
      note, split = _what_differs(config, content, rows[name]), content.get("split", "")
      found.append(Measured(name, _numbers(content), str(path), note, split))
  return found


def _row_of(run: pathlib.Path, config: Config, method: str | None, rows: Mapping[str, Config]) -> str | None:
  """Returns the row that an evaluation belongs to, the first of several with the same settings, or None."""
  named = ":".join(run.resolve().parts[-2:])
  same = [named] if named in rows else []
  same += [name for name, row in rows.items() if (row.model, row.data) == (config.model, config.data)]
  return next((name for name in same if rows[name].eval.method == method), None)


def _what_differs(config: Config, evaluation: Mapping[str, Any], row: Config) -> str:
  """Lists the differences from the row: model size, bytes trained on, settings, data and cost of the evaluation."""
  is_same = config.model == row.model
  other = [] if is_same else [f"{config.model.parameter_count() / 1e6:.3g}M parameters"]
  trained = (evaluation.get("step") or 0) * config.bytes_per_step
  planned = row.num_steps * row.bytes_per_step
  if not 0.99 * planned <= trained <= 1.01 * planned:
    other.append(f"trained on {human(trained, 'B')} of {human(planned, 'B')}")
  keys = changed_keys(row.to_dict(), config.to_dict())
  other += [f"other {key}" for key in keys if key.startswith(("optimizer", "batch_size") + ("data",) * is_same)]
  known = (None, row.data.validation, row.data.test, config.data.validation, config.data.test)
  if evaluation.get("data") not in known:
    other.append(f"scored on {human(evaluation.get('bytes') or 0, 'B')} of {evaluation['data']}")
  method, stride = row.eval.method, evaluation.get("stride") or 0
  cost, usual = windows.cost_factor(method, config.model, stride), windows.cost_factor(method, config.model)
  if not math.isclose(cost, usual):
    other.append(f"evaluated at {cost:g}x instead of {usual:g}x")
  return ", ".join(other)


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numeric entries; a word-level perplexity is named after the split it was measured on."""
  numbers = {key: value for key, value in entry.items() if isinstance(value, int | float) and key != "cost"}
  if "word_perplexity" in numbers:
    numbers[f"perplexity_{entry.get('split', 'validation')}"] = numbers["word_perplexity"]
  return numbers


def _read(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{path} is not JSON ({error}); repair or remove it") from error


def _relative(path: pathlib.Path, root: pathlib.Path) -> str:
  return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
