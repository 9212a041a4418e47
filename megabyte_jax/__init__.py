"""MEGABYTE (arXiv 2305.07185) in JAX: bytes in, next-byte probabilities out, no tokenizer."""

import os
import signal
import sys

if (  # python -m megabyte_jax.X: no traceback of Ctrl-C during its imports
  sys.argv[:1] == ["-m"]
  and any(argument.startswith("megabyte_jax.") for argument in sys.orig_argv)
  and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
  signal.signal(signal.SIGINT, signal.SIG_DFL)

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

# The first spelling of commands, `python -m megabyte_jax.generate`, still works.
__path__.append(os.path.join(__path__[0], "commands"))
