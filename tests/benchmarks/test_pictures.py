"""The pictures of docs/results.md are drawn from the files beside it."""

import sys

import pytest
from run_commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import flops_picture
import recipe_picture

RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize(
  ("module", "sources"),
  [
    (recipe_picture, ["recipe"]),
    (flops_picture, ["recipe"]),
    (flops_picture, ["--contexts", "recipe"]),
    (flops_picture, ["table3.json"]),
  ],
)
def test_a_picture_is_drawn_from_the_files(tmp_path, monkeypatch, module, sources):
  picture = tmp_path / "picture.png"
  monkeypatch.setattr(
    sys, "argv", ["picture", *(name if name.startswith("-") else str(RESULTS / name) for name in sources), str(picture)]
  )
  module.main()
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_points_are_the_measured_figures():
  folder = RESULTS / "recipe"
  rows = {corpus: flops_picture.rows_of(folder, corpus, "1e17") for corpus in ("kernel", "library", "image64")}
  points = {
    corpus: {name: [flops_picture.validation(row, n) for n in (1, 2)] for name, row in found.items()}
    for corpus, found in rows.items()
  }
  assert points == {
    "kernel": {
      "megabyte": [0.68673, 0.62411],
      "transformer": [0.75659, 0.64479],
      "windowed": [0.70363, 0.67665],
      "perceiver": [None, 0.66578],
    },
    "library": {
      "megabyte": [1.34465, 1.32776],
      "transformer": [1.35196, 1.31491],
      "windowed": [1.33448, 1.3256],
      "perceiver": [None, 1.32923],
    },
    "image64": {
      "megabyte": [1.55845, None],
      "transformer": [1.73769, 1.5783],
      "windowed": [1.48416, None],
      "perceiver": [None, 1.58114],
    },
  }
  more = flops_picture.rows_of(folder, "kernel", "3e17")
  assert {name: [flops_picture.validation(row, n) for n in (1, 2)] for name, row in more.items()} == {
    "megabyte": [0.60249, 0.54387],
    "transformer": [0.69475, 0.58753],
    "windowed": [0.63441, 0.60838],
    "perceiver": [None, 0.59233],
  }
  row = rows["kernel"]["megabyte"]
  assert flops_picture.curve(row)[-1] == (pytest.approx(1e17, rel=0.01), row["train_bpb_of_last_steps"])


def test_contexts_are_the_measured_figures():
  points = {
    suffix: {
      context: flops_picture.validation(row, 1)
      for context, row in flops_picture.context_rows(RESULTS / "recipe", suffix).items()
    }
    for suffix in ("", "_window")
  }
  assert points == {
    "": {4096: 0.83517, 8192: 0.84714, 32768: 1.29283, 131072: 2.46934},
    "_window": {32768: 0.85888, 131072: 0.89794},
  }
