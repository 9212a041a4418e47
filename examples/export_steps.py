"""Exports the evaluation and generation steps of a trained model as StableHLO, to be called without this package.

  python examples/export_steps.py --workdir=runs/quickstart --out=steps

writes three files that `jax.export.deserialize` reads on CPUs, GPUs and TPUs, without megabyte_jax:

  eval.jax_export    (parameters, x [rows, context] uint8) -> nats [rows, context]
  prompt.jax_export  (parameters, x [rows, context] int32, known) -> state
  patch.jax_export   (parameters, state, x, known, seed) -> (state, bytes [rows, P])

`parameters` is {name: array}, with the names that a checkpoint has; `state` is a list of arrays. Each call of the third
decodes one patch: bytes before `known` are those of x, all others are sampled, the same ones that `generate` samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax import export

from megabyte_jax import byte_nats, load
from megabyte_jax.checkpoints.arrays import flat_arrays
from megabyte_jax.config import MegabyteConfig
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.generation.sampling import Sampling, gumbel_noise, pick_byte
from megabyte_jax.models.build import abstract_model

PLATFORMS = ("cpu", "cuda", "tpu")


def exported_steps(config: MegabyteConfig, rows: int, sampling: Sampling) -> dict[str, export.Exported]:
  """Lowers the steps for all platforms.

  Args:
    config: of the model; its attention and dtypes are those that every platform has.
    rows: sequences at once.
    sampling: how bytes are picked.

  Returns:
    {"eval", "prompt", "patch": step}; see the head of this file.
  """
  config = dataclasses.replace(config, attention="xla", compute_dtype="float32")
  graph, abstract = abstract_model(config)
  structure = jax.tree.structure(abstract)

  def model(parameters: dict[str, jax.Array]) -> Any:
    return nnx.merge(graph, jax.tree.unflatten(structure, [parameters[name] for name in flat_arrays(abstract)]))

  def eval_step(parameters, x_BT):
    return byte_nats(model(parameters), x_BT)[0]

  def prompt_step(parameters, x_BT, known):
    return jax.tree.leaves(model(parameters).read_prompt(x_BT, known))

  state_structure = jax.tree.structure(jax.eval_shape(lambda: nnx.merge(graph, abstract).start_decoding(rows)))

  def patch_step(parameters, state, x_BT, known, seed):
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(rows))

    def pick(logits_BV, position):
      noise_BV = jax.vmap(gumbel_noise, in_axes=(0, None, None))(keys_B, position, config.vocab_size)
      sampled_B = jax.vmap(functools.partial(pick_byte, sampling=sampling))(logits_BV, noise_BV)
      given_B = jax.lax.dynamic_index_in_dim(x_BT, jnp.minimum(position, config.context - 1), 1, keepdims=False)
      return jnp.where(position < known, given_B, sampled_B)

    state, bytes_BS, _ = model(parameters).decode_patch(jax.tree.unflatten(state_structure, state), pick)
    return jax.tree.leaves(state), bytes_BS

  parameters = flat_arrays(abstract)
  x_BT = jax.ShapeDtypeStruct((rows, config.context), jnp.int32)
  known, seed = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)
  state = jax.eval_shape(prompt_step, parameters, x_BT, known)
  lower = functools.partial(export.export, platforms=PLATFORMS)
  return {
    "eval": lower(jax.jit(eval_step))(parameters, jax.ShapeDtypeStruct(x_BT.shape, jnp.uint8)),
    "prompt": lower(jax.jit(prompt_step))(parameters, x_BT, known),
    "patch": lower(jax.jit(patch_step))(parameters, state, x_BT, known, seed),
  }


def main() -> None:
  """Writes the steps of a trained model."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", default="runs/quickstart", help="the folder of a run, or of an exported model")
  parser.add_argument("--out", default="steps", help="folder of the three files")
  parser.add_argument("--rows", type=int, default=1, help="sequences at once")
  args = parser.parse_args()
  model, _, step = load(args.workdir)
  for name, exported in exported_steps(model.config, args.rows, Sampling()).items():
    with replacing(epath.Path(args.out) / f"{name}.jax_export") as file:
      file.write_bytes(exported.serialize())
  print(f"step {step} of {args.workdir}: eval, prompt and patch in {args.out}")


if __name__ == "__main__":
  main()
