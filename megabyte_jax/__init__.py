"""Implements MEGABYTE (arXiv 2305.07185) in JAX: bytes in, next-byte probabilities out, no tokenizer."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
  raise ImportError("megabyte_jax runs on Linux and macOS, not on Windows itself; run it within WSL 2")

if TYPE_CHECKING:
  from megabyte_jax.checkpoints.trained_model import load
  from megabyte_jax.config import Config, Level, MegabyteConfig, PerceiverARConfig
  from megabyte_jax.errors import ConfigError
  from megabyte_jax.generation.sampling import Sampling, generate
  from megabyte_jax.models.build import make_model
  from megabyte_jax.models.loss import bits_per_byte, byte_nats
  from megabyte_jax.models.megabyte import Megabyte
  from megabyte_jax.models.perceiver_ar import PerceiverAR

__all__ = [
  "Config",
  "ConfigError",
  "Level",
  "Megabyte",
  "MegabyteConfig",
  "PerceiverAR",
  "PerceiverARConfig",
  "Sampling",
  "bits_per_byte",
  "byte_nats",
  "generate",
  "load",
  "make_model",
]

# Where each name is defined; imported on its first use, so that `import megabyte_jax` does not wait for JAX.
_HOMES = {
  "checkpoints.trained_model": ("load",),
  "config": ("Config", "Level", "MegabyteConfig", "PerceiverARConfig"),
  "errors": ("ConfigError",),
  "generation.sampling": ("Sampling", "generate"),
  "models.build": ("make_model",),
  "models.loss": ("bits_per_byte", "byte_nats"),
  "models.megabyte": ("Megabyte",),
  "models.perceiver_ar": ("PerceiverAR",),
}


def __getattr__(name: str) -> Any:
  for home, names in _HOMES.items():
    if name in names:
      value = getattr(importlib.import_module(f"megabyte_jax.{home}"), name)
      globals()[name] = value
      return value
  raise AttributeError(f"module 'megabyte_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


if sys.argv[:1] == ["-m"]:  # the first spelling of commands, `python -m megabyte_jax.generate`, still works
  __path__.append(os.path.join(__path__[0], "commands"))
