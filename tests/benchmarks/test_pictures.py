"""The pictures of docs/results.md are drawn from the files beside it."""

import sys

import pytest
from run_commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import flops_picture
import recipe_picture

RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize(
  ("module", "sources", "flags"),
  [
    (recipe_picture, ["recipe"], []),
    (flops_picture, ["recipe", "table3.json"], []),
    (flops_picture, ["recipe", "table3.json"], ["--subwords"]),
  ],
)
def test_a_picture_is_drawn_from_the_files(tmp_path, monkeypatch, module, sources, flags):
  picture = tmp_path / "picture.png"
  monkeypatch.setattr(sys, "argv", ["picture", *(str(RESULTS / name) for name in sources), str(picture), *flags])
  module.main()
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_points_are_the_measured_figures():
  systems = {"megabyte": {"flops": 1e17, "bpb_by_method": {"basic": 1.4}}}
  points = {
    name: [flops_picture.validation(row) for row in rows]
    for name, rows in flops_picture.rows_of(RESULTS / "recipe", systems, "library").items()
  }
  assert points["megabyte"] == [(pytest.approx(3e16, rel=0.01), 1.53975), (1e17, 1.4)]
  assert points["windowed"] == [(pytest.approx(3e16, rel=0.01), 1.42696), (pytest.approx(1e17, rel=0.01), 1.34375)]
  assert points["perceiver"] == []
  (row,) = flops_picture.rows_of(RESULTS / "recipe", systems, "kernel")["megabyte"]
  assert flops_picture.validation(row) == (pytest.approx(1e17, rel=0.01), 0.6864)
  assert flops_picture.curve(row)[-1] == (pytest.approx(1e17, rel=0.01), row["train_bpb_of_last_steps"])
