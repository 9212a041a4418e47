"""Draws bits per byte against training FLOPs, from the results of recipe_runs.py and subword_systems.py.

  python benchmarks/flops_picture.py docs/results/recipe docs/results/table3.json docs/results/flops.png
  python benchmarks/flops_picture.py docs/results/recipe docs/results/table3.json docs/results/subwords.png --subwords

Lines are bits per byte of training on the way to 1e17 FLOPs. The first picture has the byte-level models on C and on
books, with points for the validation data at each tier: full ones for one pass over them, hollow ones for two (sliding
windows, and PerceiverAR). The second has the systems of Table 3, on books.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from megabyte_jax.display.plots import panels

_SUBWORDS = {
  "megabyte": "MEGABYTE",
  "transformer": "Transformer",
  "transformer_xl": "Transformer-XL, subwords",
  "compressive_transformer": "Compressive Transformer, subwords",
  "block_recurrent": "Block-Recurrent Transformer, subwords",
  "subword_perceiver_ar": "PerceiverAR, subwords",
  "subword_transformer": "Transformer, subwords",
}
_BYTE_MODELS = {
  "megabyte": "MEGABYTE",
  "transformer": "Transformer, 1,024 bytes",
  "windowed": "windowed Transformer",
  "perceiver": "PerceiverAR",
}
_CORPORA = {"kernel": ("C", 0.55), "library": ("books", 1.2)}  # title, and the fewest bits shown
_POINTS = {1: ("one pass", "full"), 2: ("two passes", "none")}  # over the validation data: name, and how it is filled
_TIERS = ("", "_1e17")  # of file names: 3e16 has none


def training_flops(row: dict[str, Any]) -> float:
  """Returns what the training of a row of either script took."""
  return row["flops"] if "flops" in row else row["train_bytes"] * row["spacebyte_flops_per_byte"]


def curve(row: dict[str, Any]) -> list[tuple[float, float]]:
  """Returns the points (training FLOPs, bits per byte of training) of a row of either script."""
  per_step = training_flops(row) / row["config"]["num_steps"]
  return [(step * per_step, bits) for step, bits, *_ in row["curve"]]


def rows_of(rows: pathlib.Path, systems: dict[str, dict], corpus: str) -> dict[str, list[dict[str, Any]]]:
  """Returns the rows of each byte-level model on a corpus, the smaller tier first; books' are partly in `systems`."""
  found = {}
  for name in _BYTE_MODELS:
    paths = [rows / f"{corpus}_{name}{tier}.json" for tier in _TIERS]
    found[name] = [json.loads(path.read_text()) for path in paths if path.exists()]
    if corpus == "library" and name in systems:
      found[name].append(systems[name])
  return found


def validation(row: dict[str, Any], passes: int) -> float | None:
  """Returns the bits per byte of the validation data by so many passes, if a row of either script has them."""
  by_method = row.get("bpb_by_method", {"basic": row.get("validation_bpb")})  # without it: older rows of recipe_runs.py
  methods = {1: "basic", 2: "sliding"}
  if row["config"]["model"]["family"] == "perceiver_ar":
    methods = {2: "basic"}  # its only evaluation moves by half of its latents
  return by_method.get(methods.get(passes, ""))


def draw_byte_models(axes: Any, rows: dict[str, list[dict[str, Any]]], title: str) -> None:
  """Draws one corpus: the curve of the larger tier of each model, and the points of all its tiers."""
  for name, label in _BYTE_MODELS.items():
    if rows[name]:
      (line,) = axes.plot(*zip(*curve(rows[name][-1]), strict=True), label=label)
      for passes, (_, filled) in _POINTS.items():
        points = [(training_flops(row), validation(row, passes)) for row in rows[name]]
        shown = [point for point in points if point[1] is not None]
        axes.plot([x for x, _ in shown], [y for _, y in shown], "o", color=line.get_color(), fillstyle=filled)
  for shown_as, filled in _POINTS.values():
    axes.plot([], [], "o", color="gray", fillstyle=filled, label=f"validation, {shown_as}")
  axes.set(title=title, xlabel="training FLOPs", ylabel="bits per byte: training, and validation (points)")


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("rows", type=pathlib.Path)
  parser.add_argument("systems", type=pathlib.Path)
  parser.add_argument("picture")
  parser.add_argument("--subwords", action="store_true", help="draw the systems of Table 3")
  arguments = parser.parse_args()
  systems = {row["row"].split(":")[1]: row for row in json.loads(arguments.systems.read_text())["rows"]}
  if arguments.subwords:
    with panels(arguments.picture, 1) as (axes,):
      for name, label in _SUBWORDS.items():
        if name in systems:
          axes.plot(*zip(*curve(systems[name]), strict=True), label=label)
      axes.set(ylim=(1.0, 2.2), xlabel="training FLOPs", ylabel="bits per byte of training")
    return
  with panels(arguments.picture, 2) as both:
    for axes, (corpus, (title, lowest)) in zip(both, _CORPORA.items(), strict=True):
      draw_byte_models(axes, rows_of(arguments.rows, systems, corpus), title)
      axes.set_ylim(lowest, lowest + 0.65)


if __name__ == "__main__":
  main()
