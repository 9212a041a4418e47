"""The pictures of docs/results.md are drawn from the files beside it."""

import sys

import pytest
from run_commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import flops_picture
import recipe_picture

RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize(
  ("module", "sources"), [(recipe_picture, ["recipe"]), (flops_picture, ["recipe", "table3.json"])]
)
def test_a_picture_is_drawn_from_the_files(tmp_path, monkeypatch, module, sources):
  picture = tmp_path / "picture.png"
  monkeypatch.setattr(sys, "argv", ["picture", *(str(RESULTS / name) for name in sources), str(picture)])
  module.main()
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_tiers_have_the_measured_figures():
  points = flops_picture.tiers(RESULTS / "recipe", {"megabyte": {"flops": 1e17, "bpb_by_method": {"basic": 1.4}}})
  assert points["megabyte"] == [(pytest.approx(3e16, rel=0.01), 1.53975), (1e17, 1.4)]
  assert points["windowed"] == [(pytest.approx(3e16, rel=0.01), 1.42696), (pytest.approx(1e17, rel=0.01), 1.34375)]
