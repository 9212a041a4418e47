"""Defines what training changes, and the step that changes it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from megabyte_jax.config import Config, DataConfig
from megabyte_jax.models.build import (
  Family,
  abstract_model,
  empty_memory,
  family_of,
  initial_parameters,
  parameter_info,
)
from megabyte_jax.models.loss import byte_nats, segment_nats, sum_of_nats
from megabyte_jax.parallel.activation_layout import BATCH, lay_out
from megabyte_jax.parallel.backend import platform
from megabyte_jax.parallel.sharding import (
  batch_sharding,
  check_mesh,
  constrain_state,
  lay_out_gradient,
  shard_abstract,
)
from megabyte_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
  """Parameters (nested dicts, float32), optimizer state, the number of steps done, and a recurrent model's memory.

  The memory is what each row of a batch remembers of its document; () where a model has none.
  """

  step: jax.Array
  parameters: dict[str, Any]
  opt_state: Any
  memory: Any = ()

  @property
  def beside_parameters(self) -> Any:
    """Part that a checkpoint keeps under `opt_state`: the optimizer's state, with the memory where there is one."""
    if self.memory == ():
      return self.opt_state
    memory = jax.tree.map(lambda a: a if a.size else None, self.memory)  # an empty array cannot be saved
    return {"optimizer": self.opt_state, "memory": memory}

  def with_beside_parameters(self, restored: Any) -> TrainState:
    """Returns the state, here as shapes, with what its `beside_parameters` were restored to."""
    if self.memory == ():
      return self._replace(opt_state=restored)

    def filled(shape, array):
      return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding) if array is None else array

    memory = jax.tree.map(filled, self.memory, restored["memory"])
    return self._replace(opt_state=restored["optimizer"], memory=memory)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Computes the state's shapes, dtypes and shardings; takes no memory.

  Raises:
    ConfigError: the mesh does not suit the model or the batch.
  """
  check_mesh(mesh, config.model, config.batch_size // config.accumulate)
  _, parameters = abstract_model(config.model)
  opt_state = jax.eval_shape(_optimizer(config).init, parameters)
  step: Any = jax.ShapeDtypeStruct((), jnp.int32)
  state = shard_abstract(TrainState(step, parameters, opt_state), parameter_info(config.model), mesh)
  return state._replace(memory=abstract_memory(config, parameters, mesh))


def abstract_memory(config: Config, parameters: Any, mesh: Mesh) -> Any:
  """Returns the shapes, dtypes and shardings of a recurrent model's memory, spread like the rows of a batch."""
  memory = jax.eval_shape(lambda parameters: empty_memory(config.model, parameters, config.batch_size), parameters)
  of_rows = batch_sharding(mesh)
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=of_rows), memory)


def _optimizer(config: Config) -> optax.GradientTransformation:
  return make_optimizer(config.optimizer, config.num_steps, parameter_info(config.model))


def initial_state(config: Config, mesh: Mesh) -> TrainState:
  """Makes a fresh state shard by shard: no device ever holds more than its part. Equal on any mesh."""
  alike = dataclasses.replace(_compiled_for(config), num_steps=1, accumulate=1, seed=0)
  return _make_initial_state(alike, mesh, family_of(config.model))(jax.random.key(config.seed))


def _compiled_for(config: Config) -> Config:
  """Returns the config without what changes no program: runs that are alike in the rest share theirs in a process."""
  names = ("model", "optimizer", "num_steps", "batch_size", "accumulate", "seed")
  tokens = config.data.form == "subwords"  # without a tokenizer a vocabulary beyond bytes is refused
  data = DataConfig(form="subwords", tokenizer=config.data.tokenizer) if tokens else DataConfig()
  return Config(data=data, **{name: getattr(config, name) for name in names})


@functools.lru_cache(maxsize=8)
def _make_initial_state(config: Config, mesh: Mesh, family: Family) -> jax.stages.Wrapped:
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))

  def make(key):
    parameters = initial_parameters(config.model, key)
    opt_state = _optimizer(config).init(parameters)
    return TrainState(jnp.int32(0), parameters, opt_state, empty_memory(config.model, parameters, config.batch_size))

  return jax.jit(make, out_shardings=shardings)


def make_train_step(config: Config, token_lengths: np.ndarray | None = None) -> jax.stages.Wrapped:
  """Makes the jitted step (state, x_BT, length_B, fresh_B) -> (state, metrics); the old state is donated.

  `length_B` is None where every row is full, `fresh_B` where the model is not recurrent. Metrics: nats (summed), bytes
  (counted), grad_norm, of recurrent models extra_loss (summed; see `Model.segment`); float32. The loss is nats plus
  extra_loss, per byte or token that counts. Dropout and the places of PerceiverAR's latents are functions of the seed
  and the step. The latest steps are kept: a run that goes on in the same process is not compiled again.

  Args:
    config: of the run.
    token_lengths: of subwords, the bytes of each; then `bytes` counts these, and `tokens` is a metric, too. Without it
      everything that is predicted counts as a byte.
  """
  lengths = None if token_lengths is None else tuple(np.asarray(token_lengths).tolist())
  return _train_step(_compiled_for(config), lengths, platform(), family_of(config.model))


@functools.lru_cache(maxsize=8)
def _train_step(
  config: Config, token_lengths: tuple[int, ...] | None, device: str, family: Family
) -> jax.stages.Wrapped:
  graph, _ = abstract_model(config.model)
  optimizer, infos = _optimizer(config), parameter_info(config.model)
  drops = config.model.dropout > 0 or config.model.attention_dropout > 0
  latents, recurrent = config.model.num_latents, config.model.recurrent
  parts = config.accumulate
  names = ("bytes",) if token_lengths is None else ("bytes", "tokens")

  def counts(x_BT, scored_BT):
    if token_lengths is None:
      return {"bytes": jnp.sum(scored_BT)}
    bytes_BT = jnp.asarray(token_lengths, jnp.int32)[x_BT]
    return {"bytes": jnp.sum(jnp.where(scored_BT, bytes_BT, 0)), "tokens": jnp.sum(scored_BT)}

  def summed_loss(parameters, memory, x_BT, length_B, fresh_B, key):
    """The sum that is differentiated; and the sums that are reported, with the memory afterwards."""
    model = nnx.merge(graph, parameters)
    options = {"length_B": length_B, "dropout_key": jax.random.fold_in(key, 1) if drops else None}
    if recurrent:
      nats_BT, scored_BT, memory, extra = segment_nats(model, memory, x_BT, fresh_B=fresh_B, **options)
      sums = {"nats": jnp.sum(nats_BT), "extra_loss": extra, **counts(x_BT, scored_BT)}
      return sums["nats"] + extra, (sums, memory)
    start_B = None  # PerceiverAR's latents: the last bytes of each row
    if latents and length_B is None:
      start_B = random_latent_starts(key, x_BT.shape, latents)
    if token_lengths is None:
      nats, count = sum_of_nats(model, x_BT, start_B=start_B, **options)
      return nats, ({"nats": nats, "bytes": count}, memory)
    nats_BT, scored_BT = byte_nats(model, x_BT, start_B=start_B, **options)
    nats = jnp.sum(nats_BT)
    return nats, ({"nats": nats, **counts(x_BT, scored_BT)}, memory)

  gradient_of_sum = jax.grad(summed_loss, has_aux=True)

  def train_step(
    state: TrainState, x_BT: jax.Array, length_B: jax.Array | None = None, fresh_B: jax.Array | None = None
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    rows = (state.memory, x_BT, length_B, fresh_B)
    if parts == 1:
      gradient, (sums, memory) = gradient_of_sum(state.parameters, *rows, key)
    else:

      def part(total, inputs):
        number, rows = inputs
        gradient, (sums, memory) = gradient_of_sum(state.parameters, *rows, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, (gradient, sums)), memory

      # Row b goes to part b % parts, so that each part is spread over all devices.
      rows = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), rows)
      zeros = dict.fromkeys(("nats", "extra_loss") if recurrent else ("nats",), jnp.float32(0))
      zeros |= dict.fromkeys(names, jnp.int32(0))
      start = (jax.tree.map(jnp.zeros_like, state.parameters), zeros)
      (gradient, sums), memory = jax.lax.scan(part, start, (jnp.arange(parts), rows))
      memory = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:]), memory)
    gradient = jax.tree.map(lambda g: g / sums[names[-1]], lay_out_gradient(gradient, infos))
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    metrics = {name: value.astype(jnp.float32) for name, value in sums.items()}
    metrics["grad_norm"] = optax.tree.norm(gradient)
    memory = jax.tree.map(lambda a: lay_out(a, PartitionSpec(BATCH)), memory)
    parameters, opt_state = constrain_state((parameters, opt_state), infos)
    return TrainState(state.step + 1, parameters, opt_state, memory), metrics

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
