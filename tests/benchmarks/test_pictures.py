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
  system = {"flops": 1e17, "config": {"model": {"family": "megabyte"}}, "bpb_by_method": {"basic": 1.4, "both": 1.3}}
  rows = flops_picture.rows_of(RESULTS / "recipe", {"megabyte": system}, "library")
  one, two = ({name: [flops_picture.validation(row, n) for row in rows[name]] for name in rows} for n in (1, 2))
  assert one == {"megabyte": [1.53975, 1.4], "transformer": [1.4504], "windowed": [1.42696, 1.34375], "perceiver": []}
  assert two["megabyte"] == [None, None]
  on_c = flops_picture.rows_of(RESULTS / "recipe", {"megabyte": system}, "kernel")
  (row,), (latents,) = on_c["megabyte"], on_c["perceiver"]
  assert [flops_picture.validation(row, n) for n in (1, 2)] == [0.68673, 0.62411]
  assert [flops_picture.validation(latents, n) for n in (1, 2)] == [None, 0.66578]
  assert flops_picture.curve(row)[-1] == (pytest.approx(1e17, rel=0.01), row["train_bpb_of_last_steps"])
