"""How a parameter is called, by sharding, Muon, checkpoints and what lays it out for decoding."""

from __future__ import annotations

import jax


def parameter_name(path: jax.tree_util.KeyPath) -> str:
  """`levels.0.decoder.blocks.qkv.kernel` of a path that `jax.tree_util` gives."""
  return jax.tree_util.keystr(path, simple=True, separator=".")
