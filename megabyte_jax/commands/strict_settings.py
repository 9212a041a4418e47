"""Switches off settings of JAX that are made for finding mistakes in programs, and that no model here can run under."""

from __future__ import annotations

import os
import sys
from typing import Any

_LENIENT = {
  "jax_numpy_rank_promotion": "allow",
  "jax_numpy_dtype_promotion": "standard",
  **{f"jax_transfer_guard{way}": "allow" for way in ("", "_host_to_device", "_device_to_device", "_device_to_host")},
}


def switch_off() -> None:
  """Has JAX, imported or not, neither refuse nor report broadcasting and transfers; says so where that is a change."""
  jax: Any = sys.modules.get("jax")
  changed = []
  for name, lenient in _LENIENT.items():
    variable = name.upper()
    if os.environ.get(variable, lenient) == lenient:
      continue
    changed.append(variable)
    os.environ[variable] = lenient
    if hasattr(jax, "config"):
      jax.config.update(name, lenient)
  if changed:
    print(f"{' and '.join(changed)} of the environment: not used here", file=sys.stderr)
