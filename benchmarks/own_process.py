"""Measurements in a process of their own, which gives its memory back and may fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def last_line(
  script: str, arguments: Sequence[str], environment: Mapping[str, str] = os.environ, patience: float | None = None
) -> Any:
  """Returns the JSON that `python SCRIPT ARGUMENTS` prints last, or a row with `error`: why there is none.

  Args:
    patience: seconds that it may take.
  """
  command = [sys.executable, script, *arguments]
  try:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=patience, check=False)
  except subprocess.TimeoutExpired:
    return {"error": f"not done after {patience:.0f} s"}
  if done.returncode == 0:
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {"error": "it printed nothing"}
  said = (line for line in done.stderr.splitlines()[::-1] if re.search("[Ee]rror|MEMORY|EXHAUSTED", line))
  memory = "out of memory: " if "RESOURCE_EXHAUSTED" in done.stderr or "OutOfMemory" in done.stderr else ""
  reason = next(said, f"exit code {done.returncode}")
  return {"error": f"{memory}{reason[:200]}", "stderr": done.stderr[-2000:]}
