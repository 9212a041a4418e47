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
  transformer = {"flops": 1e17, "config": {"model": {"family": "megabyte"}}, "bpb_by_method": {"basic": 1.4}}
  rows = flops_picture.rows_of(RESULTS / "recipe", {"transformer": transformer, "megabyte": transformer}, "library")
  one, two = ({name: [flops_picture.validation(row, n) for row in rows[name]] for name in rows} for n in (1, 2))
  small, large = (pytest.approx(flops, rel=0.01) for flops in (3e16, 1e17))
  assert one["megabyte"] == [[(small, 1.53975)], [(large, 1.34465)]]
  assert two["megabyte"] == [[], [(large, 1.32776)]]
  assert one["transformer"][-1] == [(1e17, 1.4)]
  assert one["windowed"] == [[(small, 1.42696)], [(large, 1.33448)]]
  assert one["perceiver"] == []
  on_c = flops_picture.rows_of(RESULTS / "recipe", {}, "kernel")
  (row,), (latents,) = on_c["megabyte"], on_c["perceiver"]
  assert flops_picture.validation(row, 1) == [(large, 0.68673)]
  assert flops_picture.validation(latents, 1) == []
  assert flops_picture.validation(latents, 2) == [(large, 0.66578)]
  assert flops_picture.curve(row)[-1] == (large, row["train_bpb_of_last_steps"])
