"""Keeps what a comparison leaves beside NAME.json: a small file for each row, and pictures of all rows together.

- NAME/ROW.json (RowFile): settings, what was matched, the trials of learning rates and, when the row is trained, config
  and seed, the learning curve, and bits per byte by position under each method of evaluation. A row goes on from its
  file on any machine; only a training that was cut off needs the work directory, too.
- NAME_training.png: bits per byte of training against the bytes predicted.
- NAME_by_context.png: bits per byte by position in the window, of each row under its own method (Fig. 4 of the paper).
- NAME_by_patch.png: by position in the patch, of the first row with patches, under each method (Fig. 5).
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from megabyte_jax.checkpoints.saved_config import all_differences, show_value
from megabyte_jax.config import Config
from megabyte_jax.display import plots
from megabyte_jax.errors import ConfigError
from megabyte_jax.files.atomic_file import replacing

_BINS = 64  # of a context, in files and pictures


class RowFile:
  """Holds what is known of a row so far, in one JSON file that grows.

  Args:
    path: NAME/ROW.json; made when there is something to keep.
    settings: what decides the row's results.

  Raises:
    ConfigError: the file is there, and its settings are others.
  """

  def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
    self.path, self.content = path, {"settings": json.loads(json.dumps(settings))}
    if not path.exists():
      return
    self.content = json.loads(path.read_text())
    saved, given = self.content["settings"], json.loads(json.dumps(settings))
    other = all_differences(saved.get("config", {}), given.get("config", {}))
    other |= {key: (saved.get(key), given.get(key)) for key in saved | given if key != "config"}
    lines = [f"  {key}: {show_value(a)} -> {show_value(b)}" for key, (a, b) in sorted(other.items()) if a != b]
    if lines:
      head = f"{path} was made with other settings (saved -> given):"
      raise ConfigError(head, *lines, "take the saved ones, another --output, or remove the file")

  def get_or_make(self, part: str, make: Callable[[], Any]) -> Any:
    """Returns what `make` returned when it was first called for this part."""
    if part not in self.content:
      self.content[part] = json.loads(json.dumps(make()))
      self.path.parent.mkdir(parents=True, exist_ok=True)
      with replacing(str(self.path)) as temporary:
        temporary.write_text(json.dumps(self.content) + "\n")
    return self.content[part]


def row_record(workdir: pathlib.Path, evaluations: dict[str, dict]) -> dict[str, Any]:
  """Returns what is kept of a trained row; `evaluations` are eval.py's results by method, with `positions`."""
  config = without_places(json.loads((workdir / "config.json").read_text()))
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  curve = [[line["step"], round(line["bpb"], 4)] for line in lines if "bpb" in line]
  results = {
    method: {name: value for name, value in result.items() if name not in ("positions", "workdir", "data")}
    for method, result in evaluations.items()
  }
  positions = {method: coarse(result["positions"]) for method, result in evaluations.items()}
  model, batch_size = Config.from_dict(config).model, config["batch_size"]
  return {
    "seed": config["seed"],
    "config": config,
    "bytes_per_step": batch_size * model.predicted_bytes,
    "curve": curve,  # [step, bits per byte]
    "method": config["eval"]["method"],
    "results": results,
    "positions": positions,
  }


def without_places(config: dict[str, Any]) -> dict[str, Any]:
  """Reduces the data's paths in a config (as a dict) to CORPUS/SPLIT, wherever the corpora lay."""
  places = {
    split: "/".join(pathlib.Path(config["data"][split]).parts[-2:]) for split in ("train", "validation", "test")
  }
  return config | {"data": config["data"] | places}


def coarse(positions: dict[str, Any]) -> dict[str, Any]:
  """Reduces eval_positions.json to at most 64 bins of the context, rounded."""
  bits, counts = (np.array(positions[name], np.float64) for name in ("context", "context_bytes"))
  per_bin = -(-len(counts) // _BINS)
  starts = np.arange(0, len(counts), per_bin)
  summed, counts = np.add.reduceat(np.nan_to_num(bits) * counts, starts), np.add.reduceat(counts, starts)

  def rounded(values: Any) -> list[float | None]:
    return [round(float(v), 4) if v is not None and np.isfinite(v) else None for v in values]

  with np.errstate(invalid="ignore"):
    return {
      "patch": rounded(positions["patch"]),
      "context_bin_width": per_bin * positions["context_bin_width"],
      "context": rounded(summed / counts),
    }


def draw(output: pathlib.Path, rows: dict[str, dict[str, Any]]) -> None:
  """Draws the pictures beside `output`.

  Args:
    rows: by name what `row_record` gave.
  """
  folder = output.with_suffix("")
  short = {name: name.partition(":")[2] for name in rows}

  def picture(kind: str) -> str:
    return f"{folder}_{kind}.png"

  curves = {
    short[name]: ([step * row["bytes_per_step"] / 1e6 for step, _ in row["curve"]], [bpb for _, bpb in row["curve"]])
    for name, row in rows.items()
  }
  plots.lines(curves, "Training", "million bytes predicted", "bits per byte", picture("training"), training=True)
  own = {short[name]: row["positions"][row["method"]] for name, row in rows.items()}
  contexts = {name: (bin_middles(p), floats(p["context"])) for name, p in own.items()}
  plots.lines(contexts, "Loss by position", "byte in context", "bits per byte", picture("by_context"))
  for name, row in rows.items():
    patches = {m: floats(p["patch"]) for m, p in row["positions"].items() if len(p["patch"]) > 1}
    if patches:
      plots.loss_by_position(patches, picture("by_patch"), f"Loss by position, {short[name]}", "byte in patch")
      break


def floats(values: list[float | None]) -> list[float]:
  """Replaces None by NaN."""
  return [np.nan if v is None else v for v in values]


def bin_middles(positions: dict[str, Any]) -> list[float]:
  """Returns the middle of each bin of the context, in bytes."""
  width = positions["context_bin_width"]
  return [width * (i + 0.5) for i in range(len(positions["context"]))]


def training_seconds(workdir: pathlib.Path) -> float:
  """Returns the seconds that the run has taken so far, compilation included."""
  lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
  return [line["seconds"] for line in lines if "seconds" in line][-1]
