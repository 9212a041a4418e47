"""Draws docs/results/recipe.png from the files of benchmarks/recipe_runs.py.

  python benchmarks/recipe_picture.py docs/results/recipe docs/results/recipe.png

Left: bits per byte of training against bytes, for our two recipes and for the models of other packages with the same
sizes on the same bytes. Right: what the first level contributes with and without cross-patch attention.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from megabyte_jax.display.plots import panels

_CURVES = {
  "kernel_modern": "+modern (Muon)",
  "kernel_spacebyte": "SpaceByte's MegaByte",
  "kernel_megabyte_pytorch": "MEGABYTE-pytorch",
  "kernel_scaled": "+scaled (AdamW)",
}
_CONTRIBUTIONS = {
  "kernel_modern_half": "+modern",
  "kernel_modern_half_cross_patch": "the same with cross-patch attention",
}


def read(path: pathlib.Path) -> tuple[dict[str, Any], float]:
  """Returns a row and the megabytes of one of its steps."""
  row = json.loads(path.read_text())
  return row, row["train_bytes"] / row["curve"][-1][0] / 1e6


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("rows", type=pathlib.Path)
  parser.add_argument("picture")
  arguments = parser.parse_args()
  with panels(arguments.picture, 2) as (left, right):
    for name, label in _CURVES.items():
      row, per_step = read(arguments.rows / f"{name}.json")
      left.plot([step * per_step for step, *_ in row["curve"]], [bits for _, bits, *_ in row["curve"]], label=label)
    for name, label in _CONTRIBUTIONS.items():
      row, per_step = read(arguments.rows / f"{name}.json")
      found = row["diagnoses"]
      right.plot([d["step"] * per_step for d in found], [d["first_level_bits"] for d in found], label=label)
    left.set(ylim=(0.8, 3), xlabel="megabytes", ylabel="bits per byte of training")
    right.set(xlabel="megabytes", ylabel="bits lost if the global model reads another text")


if __name__ == "__main__":
  main()
