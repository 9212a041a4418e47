"""How activations lie on a device mesh, whose axes are data, fsdp, seq and tensor (see sharding.py)."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")  # the axes that rows are spread over
ACTIVATIONS = {
  "slots": P(BATCH, None, "seq", None),  # B 1 M D: the first level's slots are spread
  "spans": P(BATCH, "seq", None, None),  # B N M D: whole spans are spread, so that they need no communication
}


def constrain(x_BNMD: jax.Array, kind: str) -> jax.Array:
  """Lays an activation out as ACTIVATIONS[kind] says, on the mesh that `jax.set_mesh` set; nothing without one."""
  if jax.sharding.get_abstract_mesh().empty:
    return x_BNMD
  return jax.lax.with_sharding_constraint(x_BNMD, ACTIVATIONS[kind])
