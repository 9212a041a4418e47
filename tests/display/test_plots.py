import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from megabyte_jax.display import plots
from megabyte_jax.models import flops


def assert_picture(path):
  """A PNG, large enough to read, with something drawn in its middle, and nothing left beside it."""
  image = Image.open(path)
  assert image.format == "PNG"
  assert min(image.size) >= 400
  middle = np.asarray(image.convert("L"))[100:-100, 100:-100]
  assert (middle < 200).mean() > 0.001
  assert not [other for other in path.parent.iterdir() if other.suffix == ".tmp"]


def write_metrics(path, steps, validation=(), tail=""):
  lines = [{"step": step, "bpb": 2 + 6 * np.exp(-step / 50), "loss": 1.0} for step in range(10, steps + 1, 10)]
  lines += [{"step": step, "validation_bpb": 2.5} for step in validation]
  path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": steps, "bpb": None}]) + tail)
  return path


@pytest.mark.parametrize(
  ("steps", "validation"), [(10, ()), (100, (50, 100)), (2000, ()), (2000, (500, 1000, 2000)), (0, (7,))]
)
def test_loss_curve(tmp_path, steps, validation):
  metrics = write_metrics(tmp_path / "metrics.jsonl", steps, validation, tail='{"step": 30, "bp')
  plots.loss_curve(metrics, tmp_path / "new" / "loss.png")
  if steps > 10:
    assert_picture(tmp_path / "new/loss.png")
  assert (tmp_path / "new/loss.png").exists()


def test_nothing_to_draw(tmp_path):
  with pytest.raises(plots.PlotError, match=r"metrics\.jsonl does not exist"):
    plots.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
  with pytest.raises(plots.PlotError, match=r"metrics\.jsonl has no bpb in any line"):
    plots.loss_curve(write_metrics(tmp_path / "metrics.jsonl", 0), tmp_path / "loss.png")
  with pytest.raises(plots.PlotError, match="no position of MEGABYTE has a loss"):
    plots.loss_by_position({"MEGABYTE": [np.nan]}, tmp_path / "loss.png", "t", "x")
  with pytest.raises(plots.PlotError, match="no curve"):
    plots.flops_per_byte({}, tmp_path / "loss.png")
  assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("count", [4, 8, 300])
def test_loss_by_position(tmp_path, count):
  values = 1 + 0.1 * np.exp(-np.arange(count))
  plots.loss_by_position(values, tmp_path / "position.png", "Within a patch", "position in the patch (bytes)")
  assert_picture(tmp_path / "position.png")


def test_loss_by_position_of_several_models_in_bins(tmp_path):
  curves = {"MEGABYTE": 1 + 0.1 * np.exp(-np.arange(16.0)), "Transformer": [1.2] * 15 + [np.nan]}
  plots.loss_by_position(curves, tmp_path / "context.png", "Within the context", "position (bytes)", bin_width=512)
  assert_picture(tmp_path / "context.png")


def test_flops_per_byte(tmp_path):
  plots.flops_per_byte(flops.figure3_curves(), tmp_path / "flops.png")
  assert_picture(tmp_path / "flops.png")


def test_smoothing_keeps_a_constant_and_follows_a_line():
  np.testing.assert_allclose(plots._smooth(np.full(50, 2.0)), 2.0)
  line = np.arange(1000.0)
  np.testing.assert_allclose(plots._smooth(line)[100:-100], line[100:-100])


def test_importing_plots_does_not_import_matplotlib():
  code = "import sys, megabyte_jax.display.plots; "
  code += "assert 'matplotlib' not in sys.modules and 'tensorflow' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
