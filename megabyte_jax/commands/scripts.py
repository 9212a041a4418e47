"""Imports train.py and eval.py, which stand at the top of a clone, or inside an installed package."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from megabyte_jax.config.shipped import shipped


def load(name: str) -> ModuleType:
  """Returns train.py or eval.py as a module.

  Not by `import train`: another file of this name may lie in the folder that Python searches first.
  """
  full_name = f"megabyte_jax.scripts.{name}"
  if full_name in sys.modules:
    return sys.modules[full_name]
  spec = importlib.util.spec_from_file_location(full_name, shipped(f"{name}.py"))
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[full_name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[full_name]
    raise
  return module
