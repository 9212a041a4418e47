"""Defines what training changes, and the step that changes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from megabyte_jax.config import Config
from megabyte_jax.models.build import abstract_model, initial_parameters, parameter_info
from megabyte_jax.models.loss import byte_nats, sum_of_nats
from megabyte_jax.parallel.sharding import check_mesh, constrain_state, shard_abstract
from megabyte_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
  """Parameters (nested dicts, float32), optimizer state and the number of steps done."""

  step: jax.Array
  parameters: dict[str, Any]
  opt_state: Any


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Computes the state's shapes, dtypes and shardings; takes no memory.

  Raises:
    ConfigError: the mesh does not suit the model or the batch.
  """
  check_mesh(mesh, config.model, config.batch_size // config.accumulate)
  _, parameters = abstract_model(config.model)
  opt_state = jax.eval_shape(_optimizer(config).init, parameters)
  step: Any = jax.ShapeDtypeStruct((), jnp.int32)
  return shard_abstract(TrainState(step, parameters, opt_state), parameter_info(config.model), mesh)


def _optimizer(config: Config) -> optax.GradientTransformation:
  return make_optimizer(config.optimizer, config.num_steps, parameter_info(config.model))


def initial_state(config: Config, mesh: Mesh) -> TrainState:
  """Makes a fresh state shard by shard: no device ever holds more than its part. Equal on any mesh."""
  abstract = abstract_state(config, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

  def make(key):
    parameters = initial_parameters(config.model, key)
    opt_state = _optimizer(config).init(parameters)
    return TrainState(jnp.int32(0), parameters, opt_state)

  return jax.jit(make, out_shardings=shardings)(jax.random.key(config.seed))


def make_train_step(config: Config, token_lengths: np.ndarray | None = None) -> jax.stages.Wrapped:
  """Makes the jitted step (state, x_BT, length_B) -> (state, metrics); the old state's memory is reused.

  `length_B` is None where every row is full. Metrics: nats (summed), bytes (counted), grad_norm; float32.
  Dropout and the places of PerceiverAR's latents are functions of the seed and the step.

  Args:
    config: of the run.
    token_lengths: of subwords, the bytes of each; then `bytes` counts these, and `tokens` is a metric, too. Without it
      everything that is predicted counts as a byte.
  """
  graph, _ = abstract_model(config.model)
  optimizer, infos = _optimizer(config), parameter_info(config.model)
  drops = config.model.dropout > 0 or config.model.attention_dropout > 0
  latents = config.model.num_latents
  parts = config.accumulate

  def summed_nats(parameters, x_BT, length_B, key):
    start_B = None  # PerceiverAR's latents: the last bytes of each row
    if latents and length_B is None:
      start_B = random_latent_starts(key, x_BT.shape, latents)
    dropout_key = jax.random.fold_in(key, 1) if drops else None
    model = nnx.merge(graph, parameters)
    options = {"length_B": length_B, "start_B": start_B, "dropout_key": dropout_key}
    if token_lengths is None:
      nats, count = sum_of_nats(model, x_BT, **options)
      return nats, {"bytes": count}
    nats_BT, scored_BT = byte_nats(model, x_BT, **options)
    bytes_BT = jnp.asarray(token_lengths, jnp.int32)[x_BT]
    return jnp.sum(nats_BT), {"bytes": jnp.sum(jnp.where(scored_BT, bytes_BT, 0)), "tokens": jnp.sum(scored_BT)}

  gradient_of_sum = jax.value_and_grad(summed_nats, has_aux=True)

  def train_step(
    state: TrainState, x_BT: jax.Array, length_B: jax.Array | None = None
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    if parts == 1:
      (nats, counts), gradient = gradient_of_sum(state.parameters, x_BT, length_B, key)
    else:

      def part(total, inputs):
        number, rows = inputs
        (nats, counts), gradient = gradient_of_sum(state.parameters, *rows, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, (nats, counts, gradient)), None

      # Row b goes to part b % parts, so that each part is spread over all devices.
      rows = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), (x_BT, length_B))
      none = dict.fromkeys(("bytes",) if token_lengths is None else ("bytes", "tokens"), jnp.int32(0))
      zeros = (jnp.float32(0), none, jax.tree.map(jnp.zeros_like, state.parameters))
      (nats, counts, gradient), _ = jax.lax.scan(part, zeros, (jnp.arange(parts), rows))
    predicted = counts.get("tokens", counts["bytes"])
    gradient = jax.tree.map(lambda g: g / predicted, gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    counted = {name: count.astype(jnp.float32) for name, count in counts.items()}
    metrics = {"nats": nats, **counted, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(state.step + 1, *constrain_state((parameters, opt_state), infos)), metrics

  return jax.jit(train_step, donate_argnums=0)


_SHORT_PREFIX_SHARE = 1 / 8  # of packed rows; see random_latent_starts


def random_latent_starts(key: jax.Array, shape: tuple[int, int], latents: int) -> jax.Array:
  """Draws the start of PerceiverAR's latents in each row [B, T] of a packed text, int32 [B].

  The rows are spans from the middle of the text, so the latents lie at their end; in one row of eight they may start
  anywhere, for the short prefixes that evaluation meets at the beginning of every text. Windows of whole documents
  need no such thing: data/batches.py cuts them as evaluation does.
  """
  B, T = shape
  latest = max(T - latents, 0)
  anywhere_B = jax.random.randint(jax.random.fold_in(key, 2), (B,), 0, latest + 1)
  is_short_B = jax.random.bernoulli(jax.random.fold_in(key, 3), _SHORT_PREFIX_SHARE, (B,))
  return jnp.where(is_short_B, anywhere_B, latest)
