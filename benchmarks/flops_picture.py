"""Draws bits per byte against training FLOPs, from the results of recipe_runs.py or of subword_systems.py.

  python benchmarks/flops_picture.py docs/results/recipe docs/results/flops.png
  python benchmarks/flops_picture.py docs/results/recipe docs/results/contexts.png --contexts
  python benchmarks/flops_picture.py docs/results/table3.json docs/results/subwords.png

Lines are bits per byte of training on the way to 1e17 FLOPs, on C to 3e17, too, in the second picture to 3e16. The
first, of a folder of results, has the byte-level models on C, books and photographs, with points for the validation
data: full ones for one pass over them, hollow ones for two (sliding windows, and PerceiverAR). The second has MEGABYTE
with other contexts on C, and its validation by one pass. The third, of a file, has the systems of Table 3, on books.
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
  "windowed": "windowed attention",
  "perceiver": "PerceiverAR",
}
_CORPORA = {  # title, and the bits shown
  "kernel": ("C", (0.5, 1.2)),
  "library": ("books", (1.25, 1.65)),
  "image64": ("photographs", (1.1, 2.2)),
}
_TIERS = ("1e17", "3e17")  # training FLOPs, as in the names of files
_CONTEXTS = (4096, 8192, 32_768, 131_072)
_POINTS = {1: ("one pass", "full"), 2: ("two passes", "none")}  # over the validation data: name, and how it is filled


def training_flops(row: dict[str, Any]) -> float:
  """Returns what the training of a row of either script took."""
  return row["flops"] if "flops" in row else row["train_bytes"] * row["spacebyte_flops_per_byte"]


def curve(row: dict[str, Any]) -> list[tuple[float, float]]:
  """Returns the points (training FLOPs, bits per byte of training) of a row of either script."""
  per_step = training_flops(row) / row["config"]["num_steps"]
  return [(step * per_step, bits) for step, bits, *_ in row["curve"]]


def rows_of(folder: pathlib.Path, corpus: str, tier: str) -> dict[str, dict[str, Any]]:
  """Returns the rows of so many FLOPs on a corpus, by the names of those byte-level models that have one."""
  paths = {name: folder / f"{corpus}_{name}_{tier}.json" for name in _BYTE_MODELS}
  return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def validation(row: dict[str, Any], passes: int) -> float | None:
  """Returns the bits per byte of the validation data by so many passes, if a row of either script has them."""
  by_method = row.get("bpb_by_method", {"basic": row.get("validation_bpb")})  # without it: older rows of recipe_runs.py
  methods = {1: "basic", 2: "sliding"}
  if row["config"]["model"]["family"] == "perceiver_ar":
    methods = {2: "basic"}  # its only evaluation moves by half of its latents
  return by_method.get(methods.get(passes, ""))


def draw_byte_models(axes: Any, tiers: list[dict[str, dict[str, Any]]], legend: bool) -> None:
  """Draws one corpus: curves of each model, and its points after a curve's end; the models' names, if `legend`."""
  for name, label in _BYTE_MODELS.items():
    (named,) = axes.plot([], [], label=label if legend else None)  # without a row its colour is used up all the same
    for row in (rows[name] for rows in tiers if name in rows):
      first = row is tiers[0][name]
      axes.plot(*zip(*curve(row), strict=True), color=named.get_color(), **({} if first else {"alpha": 0.4, "lw": 1}))
      for passes, (_, filled) in _POINTS.items():
        bits = validation(row, passes)
        if bits is not None:
          at = training_flops(row) * (1 + 0.08 * passes)
          axes.plot([at], [bits], "o", color=named.get_color(), fillstyle=filled)
  for shown_as, filled in _POINTS.values() if legend else ():
    axes.plot([], [], "o", color="gray", fillstyle=filled, label=f"validation, {shown_as}")
  axes.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte: training, and validation (points)")


def context_rows(folder: pathlib.Path, suffix: str) -> dict[int, dict[str, Any]]:
  """Returns the rows of 3e16 FLOPs on C by their contexts: whole attention, or with `suffix` that of a window."""
  paths = {context: folder / f"kernel_megabyte_context_{context}{suffix}_3e16.json" for context in _CONTEXTS}
  return {context: json.loads(path.read_text()) for context, path in paths.items() if path.exists()}


def draw_contexts(on_the_way: Any, at_the_end: Any, folder: pathlib.Path) -> None:
  """Draws the curves of training, and the bits of validation against the context."""
  colors: dict[int, str] = {}
  for suffix, style, shown_as in (("", "-", "all patches seen"), ("_window", "--", "1,024 patches seen")):
    rows = context_rows(folder, suffix)
    for context, row in rows.items():
      label = f"{context:,} bytes{', 1,024 patches seen' if suffix else ''}"
      (line,) = on_the_way.plot(*zip(*curve(row), strict=True), style, color=colors.get(context), label=label)
      colors[context] = line.get_color()
    bits = [validation(row, 1) for row in rows.values()]
    at_the_end.plot(list(rows), bits, f"o{style}", color="gray", label=shown_as)
  on_the_way.set(ylim=(0.5, 4.8), xlabel="training FLOPs", ylabel="bits per byte of training")
  at_the_end.set(xscale="log", xlabel="bytes of context", ylabel="validation bits per byte, one pass", ylim=(0.7, 2.6))
  at_the_end.set_xticks(_CONTEXTS, [f"{context:,}" for context in _CONTEXTS], minor=False)
  at_the_end.minorticks_off()


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("results", type=pathlib.Path, help="a folder of recipe_runs.py's, or subword_systems.py's file")
  parser.add_argument("picture")
  parser.add_argument("--contexts", action="store_true", help="of a folder, the rows of other contexts")
  arguments = parser.parse_args()
  if arguments.contexts:
    with panels(arguments.picture, 2) as (on_the_way, at_the_end):
      draw_contexts(on_the_way, at_the_end, arguments.results)
    return
  if arguments.results.is_dir():
    with panels(arguments.picture, len(_CORPORA)) as all_axes:
      for axes, (corpus, (title, bits)) in zip(all_axes, _CORPORA.items(), strict=True):
        tiers = [rows_of(arguments.results, corpus, tier) for tier in _TIERS]
        draw_byte_models(axes, tiers, legend=axes is all_axes[-1])
        axes.set(title=title, xlim=(5e15, 5e17 if any(tiers[1:]) else 1.5e17), ylim=bits)
    return
  systems = {row["row"].split(":")[1]: row for row in json.loads(arguments.results.read_text())["rows"]}
  with panels(arguments.picture, 1) as (axes,):
    for name, label in _SUBWORDS.items():
      if name in systems:
        axes.plot(*zip(*curve(systems[name]), strict=True), label=label)
    axes.set(ylim=(1.0, 2.2), xlabel="training FLOPs", ylabel="bits per byte of training")


if __name__ == "__main__":
  main()
