"""Runs the levels below the first on groups of patches, one after the other, for very long sequences.

Given the first level's output the patches are independent (without cross-patch attention). So the nats of a group and
their gradient are computed in one pass, and only sums and the gradient of the first level's output are kept.

Shapes: B batch, T bytes, K patches, P bytes of a patch, G patches of a group, g groups, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from megabyte_jax.config import MegabyteConfig
from megabyte_jax.models.family import Model, counted
from megabyte_jax.models.global_and_local import LevelModel, finer_levels
from megabyte_jax.models.layers.cross_entropy import cross_entropy
from megabyte_jax.parallel.activation_layout import AXES, BATCH, divides, mesh_axes

_SPREAD = P(None, BATCH, "seq")  # how arrays [g, B, G, ..] lie on a mesh


class PatchGroups(Model):
  """Computes nats group by group where `config.patch_groups` asks for it: a part of `Megabyte`."""

  config: MegabyteConfig
  levels: Sequence[LevelModel]

  def first_level(self, x_BT: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Returns the first level's output for each patch, [B, K, D]."""
    raise NotImplementedError

  def byte_nats(
    self,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    start_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the nats of every byte [B, T] and which count; without dropout only a group's logits are in memory."""
    if self.config.patch_groups == 1 or dropout_key is not None:
      return super().byte_nats(x_BT, length_B=length_B, dropout_key=dropout_key)
    B, T = x_BT.shape

    def group_nats(group):
      h_BGD, x_BGP = group
      return cross_entropy(_logits(self.levels, h_BGD, x_BGP, None), x_BGP)

    nats_gBGP = jax.lax.map(group_nats, self._groups(self.first_level(x_BT), x_BT))
    nats_BT = jnp.moveaxis(nats_gBGP, 0, 2).reshape(B, -1)[:, :T]
    scored_BT = counted(x_BT, length_B)
    return jnp.where(scored_BT, nats_BT, 0.0), scored_BT

  def sum_of_nats(
    self,
    x_BT: jax.Array,
    *,
    length_B: jax.Array | None = None,
    start_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the sum over the bytes that count; forward and backward run group by group, without recomputation."""
    if self.config.patch_groups == 1:
      return super().sum_of_nats(x_BT, length_B=length_B, dropout_key=dropout_key)
    scored_BT = counted(x_BT, length_B)
    h_gBGD, x_gBGP = self._groups(self.first_level(x_BT, dropout_key), x_BT)
    (scored_gBGP,) = self._groups(None, scored_BT)
    graph, levels = nnx.split(nnx.List(self.levels[1:]))
    keys = None
    if dropout_key is not None:  # numbers 0, 1, ... are those of the levels
      keys = jax.random.split(jax.random.fold_in(dropout_key, len(self.levels)), len(x_gBGP))

    def group_sum(levels, h_BGD, x_BGP, scored_BGP, key):
      logits = _logits([None, *nnx.merge(graph, levels)], h_BGD, x_BGP, key)
      return jnp.sum(jnp.where(scored_BGP, cross_entropy(logits, x_BGP), 0.0))

    alone = keys is None and _may_work_alone(h_gBGD)
    nats = _sum_in_one_pass(group_sum, levels, h_gBGD, (x_gBGP, scored_gBGP, keys), alone=alone)
    return nats, jnp.sum(scored_BT)

  def _groups(self, h_BKD: jax.Array | None, x_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Returns each group's first-level outputs [g, B, G, D] (if given) and what x says of its bytes [g, B, G, P].

    Patch k goes to group k % g, so that devices that share a sequence share every group. What is missing is zero.
    """
    g, P = self.config.patch_groups, self.config.levels[0].patch_size
    B, T = x_BT.shape
    patches = -(-T // (P * g)) * g
    x_BKP = jnp.pad(x_BT, ((0, 0), (0, patches * P - T))).reshape(B, patches, P)
    arrays = [x_BKP]
    if h_BKD is not None:
      missing = patches - h_BKD.shape[1]
      arrays.insert(0, jnp.pad(h_BKD, ((0, 0), (0, missing), (0, 0))) if missing > 0 else h_BKD[:, :patches])
    return tuple(jnp.moveaxis(a.reshape(B, patches // g, g, -1), 2, 0) for a in arrays)


def _may_work_alone(h_gBGD: jax.Array) -> bool:
  """Returns whether devices that share rows or sequences, and have all parameters, can each take a part of a group."""
  axes = mesh_axes()
  if not axes.keys() >= set(AXES) or axes["fsdp"] * axes["tensor"] > 1:
    return False
  return axes["data"] * axes["seq"] > 1 and divides(axes, _SPREAD, h_gBGD.shape)


def _sum_in_one_pass(
  function: Callable[..., jax.Array], parameters: Any, inputs_g: jax.Array, rest_g: Any, *, alone: bool
) -> jax.Array:
  """sum over g of function(parameters, inputs_g[g], *rest_g[g]), differentiable in parameters and inputs.

  With `alone` each device takes its part of every group, and gradients are summed over devices after the last group;
  XLA alone would sum them after each.
  """

  @jax.custom_vjp
  def total(parameters, inputs_g):
    def add(sum_, group):
      return sum_ + function(parameters, group[0], *group[1]), None

    return jax.lax.scan(add, jnp.float32(0), (inputs_g, rest_g))[0]

  def sums_and_gradients(parameters, inputs_g, rest_g):
    def add(carry, group):
      value, gradients = jax.value_and_grad(function, (0, 1))(parameters, group[0], *group[1])
      return jax.tree.map(jnp.add, carry, (value, gradients[0])), gradients[1]

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
    sums, of_inputs_g = jax.lax.scan(add, zeros, (inputs_g, rest_g))
    return jax.lax.psum(sums, AXES) if alone else sums, of_inputs_g

  def forward(parameters, inputs_g):
    run = sums_and_gradients
    if alone:
      specs = (P(), _SPREAD, _SPREAD)
      run = jax.shard_map(run, in_specs=specs, out_specs=specs[:2], check_vma=False)
    (sum_, of_parameters), of_inputs_g = run(parameters, inputs_g, rest_g)
    return sum_, (of_parameters, of_inputs_g)

  def backward(gradients, scale):
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)

  total.defvjp(forward, backward)
  return total(parameters, inputs_g)


def _logits(levels: Any, h_BGD: jax.Array, x_BGP: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
  B, G, P = x_BGP.shape
  return finer_levels(levels, x_BGP.reshape(B, G * P), h_BGD, dropout_key).reshape(B, G, P, -1)
