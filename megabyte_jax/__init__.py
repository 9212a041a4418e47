"""MEGABYTE (arXiv 2305.07185) in JAX: bytes in, next-byte probabilities out, no tokenizer."""

from megabyte_jax.config import Config, ConfigError, Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.loss import bits_per_byte, byte_nats
from megabyte_jax.models.build import make_model
from megabyte_jax.models.megabyte import Megabyte
from megabyte_jax.models.perceiver_ar import PerceiverAR
from megabyte_jax.pretrained import load
from megabyte_jax.sampling import Sampling, generate

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
