"""Draws bits per byte against training FLOPs, from the results of recipe_runs.py and subword_systems.py.

  python benchmarks/flops_picture.py docs/results/recipe docs/results/table3.json docs/results/flops.png

Left: bits per byte of training on the way, for the systems of Table 3 at equal FLOPs. Right: bits per byte of
validation by basic inference, of byte-level models at two tiers.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from megabyte_jax.display.plots import panels

_SYSTEMS = {
  "megabyte": "MEGABYTE",
  "transformer": "Transformer",
  "transformer_xl": "Transformer-XL, subwords",
  "compressive_transformer": "Compressive Transformer, subwords",
  "block_recurrent": "Block-Recurrent Transformer, subwords",
  "subword_perceiver_ar": "PerceiverAR, subwords",
  "subword_transformer": "Transformer, subwords",
}
_BYTE_MODELS = {"megabyte": "MEGABYTE", "transformer": "Transformer", "windowed": "windowed Transformer"}


def tiers(rows: pathlib.Path, systems: dict[str, dict]) -> dict[str, list[tuple[float, float]]]:
  """Returns the points (training FLOPs, bits per byte of validation) of each byte-level model."""
  points: dict[str, list[tuple[float, float]]] = {}
  for name in _BYTE_MODELS:
    small, large = (rows / f"library_{name}{tier}.json" for tier in ("", "_1e17"))
    points[name] = []
    for path in (small, large) if large.exists() else (small,):
      row = json.loads(path.read_text())
      points[name].append((row["train_bytes"] * row["spacebyte_flops_per_byte"], row["validation_bpb"]))
    if name in systems:
      points[name].append((systems[name]["flops"], systems[name]["bpb_by_method"]["basic"]))
  return points


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("rows", type=pathlib.Path)
  parser.add_argument("systems", type=pathlib.Path)
  parser.add_argument("picture")
  arguments = parser.parse_args()
  systems = {row["row"].split(":")[1]: row for row in json.loads(arguments.systems.read_text())["rows"]}
  with panels(arguments.picture, 2) as (left, right):
    for name, label in _SYSTEMS.items():
      if name in systems:
        row = systems[name]
        per_step = row["flops"] / row["config"]["num_steps"]
        left.plot([step * per_step for step, _ in row["curve"]], [bits for _, bits in row["curve"]], label=label)
    for name, points in tiers(arguments.rows, systems).items():
      right.plot(*zip(*points, strict=True), "o-", label=_BYTE_MODELS[name])
    left.set(ylim=(1.0, 2.2), xlabel="training FLOPs", ylabel="bits per byte of training")
    right.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte of validation")


if __name__ == "__main__":
  main()
