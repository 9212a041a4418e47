"""Says what can be set: the run, its model and its data, as checked dataclasses; it knows nothing of arrays."""

from megabyte_jax.config.block_recurrent import BlockRecurrentConfig
from megabyte_jax.config.compressive_transformer import CompressiveTransformerConfig
from megabyte_jax.config.levels import BlockOptions, Level
from megabyte_jax.config.megabyte import MegabyteConfig
from megabyte_jax.config.model import ModelConfig
from megabyte_jax.config.perceiver_ar import PerceiverARConfig
from megabyte_jax.config.run import CheckpointConfig, Config, DataConfig, EvalConfig, MeshConfig, OptimizerConfig
from megabyte_jax.config.transformer_xl import TransformerXLConfig
from megabyte_jax.errors import ConfigError

__all__ = [
  "BlockOptions",
  "BlockRecurrentConfig",
  "CheckpointConfig",
  "CompressiveTransformerConfig",
  "Config",
  "ConfigError",
  "DataConfig",
  "EvalConfig",
  "Level",
  "MegabyteConfig",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "PerceiverARConfig",
  "TransformerXLConfig",
]
