"""The notebook in examples/ runs from its first cell to its last."""

import json
import os
import re
import subprocess
import sys

import pytest
from run_commands import ROOT, XLA_FLAGS

CELLS = [
  cell
  for cell in json.loads((ROOT / "examples" / "tutorial.ipynb").read_text())["cells"]
  if cell["cell_type"] == "code"
]


def test_what_it_prints_is_kept():
  for cell in CELLS:
    assert cell["outputs"] or "print(" not in "".join(cell["source"])
    assert all(output["output_type"] != "error" for output in cell["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 300])
def test_the_tutorial_runs(tmp_path, steps):
  """Its cells check by themselves what they say of slots, logits and receptive fields."""
  code = "\n\n".join("".join(cell["source"]) for cell in CELLS)
  code, found = re.subn(r"^STEPS = \d+", f"STEPS = {steps}", code, flags=re.MULTILINE)
  assert found == 1
  script = tmp_path / "tutorial.py"
  script.write_text(code)
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment |= {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
  if steps < 300:
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "XLA_FLAGS": XLA_FLAGS}
  done = subprocess.run(
    [sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  bits = float(re.search(r"MEGABYTE, sliding inference: ([\d.]+)", done.stdout).group(1))
  assert bits < (3.1 if steps == 300 else 9)
