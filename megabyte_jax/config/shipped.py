"""Finds train.py, eval.py and configs/: at the top of a clone, or inside an installed package."""

from __future__ import annotations

import pathlib

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
INSTALLED = _PACKAGE / "scripts"  # made by pip install, see pyproject.toml


def shipped(name: str = "") -> pathlib.Path:
  """Returns the path of what stands at the top of the repository, such as `train.py` or `configs/small.py`.

  There may be no such file.
  """
  return (INSTALLED if INSTALLED.is_dir() else _PACKAGE.parent) / name
