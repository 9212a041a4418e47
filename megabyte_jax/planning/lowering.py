"""Lowers a config's step for a mesh whose devices need not exist, and reads the memory of the compiled program."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from megabyte_jax.config import Config
from megabyte_jax.config.model import token_dtype
from megabyte_jax.evaluation.evaluate import make_eval_step
from megabyte_jax.generation import sampling
from megabyte_jax.models.build import abstract_model, cast_for_decoding, parameter_info
from megabyte_jax.parallel.sharding import batch_sharding, shard_abstract
from megabyte_jax.training.state import abstract_memory, abstract_state, make_train_step


def lower(config: Config, mesh: Mesh, step: str) -> jax.stages.Lowered:
  """Lowers one step for abstract arguments with the shardings of a real run; allocates nothing.

  Args:
    config: the run; `batch_size` counts the rows of the whole mesh.
    mesh: the devices, which may be those of a topology that does not exist here.
    step: train | eval | generate; `generate` decodes one chunk of bytes with full caches.
  """
  may_be_short, recurrent = config.windows_may_be_short, config.model.recurrent

  def rows(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

  x_BT = rows((config.batch_size, config.model.context), token_dtype(config.model.vocab_size))
  length_B = rows((config.batch_size,), jnp.int32)
  fresh_B = rows((config.batch_size,), jnp.bool_)
  with jax.set_mesh(mesh):
    if step == "train":
      of_rows = (length_B if may_be_short else None, fresh_B if recurrent else None)
      return make_train_step(config).lower(abstract_state(config, mesh), x_BT, *of_rows)
    _, parameters = abstract_model(config.model)
    infos = parameter_info(config.model)
    if step == "eval":
      parameters = shard_abstract(parameters, infos, mesh)
      if recurrent:
        memory = abstract_memory(dataclasses.replace(config, model=config.model.for_evaluation), parameters, mesh)
        return make_eval_step(config).lower(parameters, memory, x_BT, length_B, fresh_B)
      return make_eval_step(config).lower(parameters, x_BT, length_B, *([length_B] if config.model.num_latents else []))
    parameters = jax.eval_shape(functools.partial(cast_for_decoding, config.model), parameters)
    return _lower_generate(config, mesh, shard_abstract(parameters, infos, mesh))


def _lower_generate(config: Config, mesh: Mesh, parameters: Any) -> jax.stages.Lowered:
  """Lowers the decoding of one chunk of bytes for `batch_size` rows with full caches."""
  graph, _ = abstract_model(config.model)
  batch, context = config.batch_size, config.model.context
  x_BT = jax.ShapeDtypeStruct((batch, context), jnp.int32, sharding=NamedSharding(mesh, sampling.row_spec(2)))
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  state = jax.eval_shape(
    lambda p, x, *where: nnx.merge(graph, p).read_prompt(x, *where), parameters, x_BT, scalar, scalar
  )

  def place(leaf):
    sharding = NamedSharding(mesh, sampling.row_spec(len(leaf.shape)))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  arguments = (parameters, jax.tree.map(place, state), x_BT, scalar, scalar, scalar, keys_B)
  return sampling.decode_chunk.lower(graph, sampling.Sampling(), sampling.chunk_bytes(config.model), *arguments)


class Memory(NamedTuple):
  """Memory of one device that a compiled program needs, in bytes; output in memory of the arguments counts once."""

  arguments: int
  temporaries: int
  output: int


def memory_of(compiled: jax.stages.Compiled) -> Memory:
  """Returns the compiler's own figures for a compiled program."""
  uses: Any = compiled.memory_analysis()
  output = uses.output_size_in_bytes - uses.alias_size_in_bytes
  return Memory(uses.argument_size_in_bytes, uses.temp_size_in_bytes, output)
