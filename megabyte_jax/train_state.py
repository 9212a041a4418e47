"""What training changes, and the steps that change or measure it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from megabyte_jax.config import Config
from megabyte_jax.loss import byte_nats
from megabyte_jax.models.build import abstract_model, initial_parameters
from megabyte_jax.optimizer import make_optimizer
from megabyte_jax.sharding import check_mesh, shard_abstract


class TrainState(NamedTuple):
  """Parameters (nested dicts, float32), optimizer state and the number of steps done."""

  step: jax.Array
  parameters: dict[str, Any]
  opt_state: Any


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """The state's shapes, dtypes and shardings; takes no memory.

  Raises:
    ConfigError: the mesh does not suit the model or the batch.
  """
  check_mesh(mesh, config.model, config.batch_size // config.accumulate)
  _, parameters = abstract_model(config.model)
  opt_state = jax.eval_shape(make_optimizer(config.optimizer, config.num_steps).init, parameters)
  return shard_abstract(TrainState(jax.ShapeDtypeStruct((), jnp.int32), parameters, opt_state), mesh)


def initial_state(config: Config, mesh: Mesh) -> TrainState:
  """A fresh state, made shard by shard: no device ever holds more than its part. Equal on any mesh."""
  abstract = abstract_state(config, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

  def make(key):
    parameters = initial_parameters(config.model, key)
    opt_state = make_optimizer(config.optimizer, config.num_steps).init(parameters)
    return TrainState(jnp.int32(0), parameters, opt_state)

  return jax.jit(make, out_shardings=shardings)(jax.random.key(config.seed))


def make_train_step(config: Config) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The jitted step (state, x_BT, length_B) -> (state, metrics); the old state's memory is reused.

  `length_B` is None where every row is full. Metrics: nats (summed), bytes (counted), grad_norm; float32.
  Dropout is a function of the seed and the step.
  """
  graph, _ = abstract_model(config.model)
  optimizer = make_optimizer(config.optimizer, config.num_steps)
  drops = config.model.dropout > 0 or config.model.attention_dropout > 0
  parts = config.accumulate

  def summed_nats(parameters, x_BT, length_B, key):
    nats_BT, scored_BT = byte_nats(nnx.merge(graph, parameters), x_BT, length_B=length_B, dropout_key=key)
    return jnp.sum(nats_BT), jnp.sum(scored_BT)

  gradient_of_sum = jax.value_and_grad(summed_nats, has_aux=True)

  def train_step(state: TrainState, x_BT: jax.Array, length_B: jax.Array | None = None):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step) if drops else None
    if parts == 1:
      (nats, count), gradient = gradient_of_sum(state.parameters, x_BT, length_B, key)
    else:

      def part(total, inputs):
        number, rows = inputs
        part_key = None if key is None else jax.random.fold_in(key, number)
        (nats, count), gradient = gradient_of_sum(state.parameters, *rows, part_key)
        return jax.tree.map(jnp.add, total, (nats, count, gradient)), None

      # Row b goes to part b % parts, so that each part is spread over all devices.
      rows = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), (x_BT, length_B))
      zeros = (jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, state.parameters))
      (nats, count, gradient), _ = jax.lax.scan(part, zeros, (jnp.arange(parts), rows))
    gradient = jax.tree.map(lambda g: g / count, gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    metrics = {"nats": nats, "bytes": count.astype(jnp.float32), "grad_norm": optax.tree.norm(gradient)}
    return TrainState(state.step + 1, parameters, opt_state), metrics

  return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: Config) -> Callable[..., jax.Array]:
  """The jitted (parameters, x_BT, length_B, start_B) -> nats_BT; see `byte_nats`. `start_B` is for PerceiverAR."""
  graph, _ = abstract_model(config.model)

  @jax.jit
  def eval_step(parameters, x_BT, length_B, start_B=None):
    return byte_nats(nnx.merge(graph, parameters), x_BT, length_B=length_B, start_B=start_B)[0]

  return eval_step
