"""Exports a trained MEGABYTE with jax.export: programs that score and generate bytes without this package.

  python examples/jax_export.py runs/quickstart runs/programs                   writes the programs and the parameters
  python examples/jax_export.py --run runs/programs "It is a truth"             scores a text and continues it

A folder holds three StableHLO programs of fixed shapes, for one text at a time, and parameters.npz:

  evaluate.bin       (parameters, bytes [1, T]) -> nats [1, T]
  read_prompt.bin    (parameters, bytes [1, T], how many are known) -> state
  decode_patch.bin   (parameters, state, noise [1, S, V]) -> (state, bytes [1, S])

T is the context and S the first level's patch. A byte is the largest of logits + noise: noise of zeros takes the most
probable byte, Gumbel noise draws from the model. The state is a list of arrays. `run` below needs JAX and NumPy, and
flatbuffers for reading programs: pip install flatbuffers.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

PROGRAMS = ("evaluate", "read_prompt", "decode_patch")


def write(workdir: str, folder: pathlib.Path, platforms: list[str] | None = None) -> None:
  """Exports the model of a run to `folder`, for `platforms` such as cpu, cuda and tpu; None takes this machine's."""
  from megabyte_jax import MegabyteConfig, byte_nats, load  # noqa: PLC0415  (`run` does without)
  from megabyte_jax.models.build import trained_model  # noqa: PLC0415

  loaded, config, _ = load(workdir)
  if not isinstance(config.model, MegabyteConfig):
    raise SystemExit(f"error: {workdir} holds no MEGABYTE but {config.model.family}, whose decoding has other states")
  from flax import nnx  # noqa: PLC0415

  model_config = dataclasses.replace(config.model, attention="xla")  # no kernels that only some devices have
  nested = nnx.to_pure_dict(nnx.state(loaded))
  leaves, tree = jax.tree.flatten(nested)
  patch, context = model_config.levels[0].patch_size, model_config.context

  def model(parameters):
    return trained_model(model_config, jax.tree.unflatten(tree, parameters))

  def evaluate(parameters, x_BT):
    return byte_nats(model(parameters), x_BT)[0]

  def read_prompt(parameters, x_BT, known):
    return jax.tree.leaves(model(parameters).read_prompt(x_BT, known))

  state_tree = jax.tree.structure(jax.eval_shape(lambda: model(leaves).start_decoding(1)))

  def decode_patch(parameters, state, noise_BSV):
    def pick(logits_BV, position):
      return jnp.argmax(logits_BV + noise_BSV[:, position % patch], axis=-1).astype(jnp.int32)

    state, x_BS, _ = model(parameters).decode_patch(jax.tree.unflatten(state_tree, state), pick)
    return jax.tree.leaves(state), x_BS

  parameters = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
  x_BT, known = jax.ShapeDtypeStruct((1, context), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
  noise_BSV = jax.ShapeDtypeStruct((1, patch, model_config.vocab_size), jnp.float32)
  state = jax.eval_shape(read_prompt, parameters, x_BT, known)
  arguments = ((parameters, x_BT), (parameters, x_BT, known), (parameters, state, noise_BSV))
  folder.mkdir(parents=True, exist_ok=True)
  for name, function, shapes in zip(PROGRAMS, (evaluate, read_prompt, decode_patch), arguments, strict=True):
    program = export.export(jax.jit(function), platforms=platforms)(*shapes)
    (folder / f"{name}.bin").write_bytes(program.serialize())
  np.savez(folder / "parameters.npz", *map(np.asarray, leaves))


def run(folder: pathlib.Path, text: bytes, num_bytes: int, seed: int | None = None) -> tuple[float, bytes]:
  """Returns the bits per byte of `text` and its continuation; without a seed always the most probable byte.

  The text and what follows must fit the context. Whole patches of the text are read at once, the rest is decoded as
  given, by noise that leaves no choice.
  """
  evaluate, read_prompt, decode_patch = (
    jax.jit(export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())).call) for name in PROGRAMS
  )
  with np.load(folder / "parameters.npz") as file:
    parameters = [file[f"arr_{i}"] for i in range(len(file.files))]
  context = export.deserialize(bytearray((folder / "evaluate.bin").read_bytes())).in_avals[-1].shape[1]
  _, patch, vocabulary = export.deserialize(bytearray((folder / "decode_patch.bin").read_bytes())).in_avals[-1].shape
  x_BT = np.zeros((1, context), np.int32)
  x_BT[0, : len(text)] = np.frombuffer(text, np.uint8)
  bits = float(evaluate(parameters, x_BT)[0, : len(text)].sum() / np.log(2) / len(text))
  state, made = read_prompt(parameters, x_BT, np.int32(len(text))), bytearray()
  alignment = int(state[-1])  # bytes that have been read: the state ends with its position
  generator = np.random.default_rng(seed)
  for start in range(alignment, len(text) + num_bytes, patch):
    shape = (1, patch, vocabulary)
    noise_BSV = np.zeros(shape, np.float32) if seed is None else generator.gumbel(size=shape).astype(np.float32)
    for i, byte in enumerate(text[start : start + patch]):
      noise_BSV[0, i, byte] = np.inf
    state, x_BS = decode_patch(parameters, state, noise_BSV)
    made += np.asarray(x_BS[0], np.uint8).tobytes()
  return bits, bytes(made[len(text) - alignment :][:num_bytes])


def main() -> None:
  """Reads the command line; see the head of this file."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", help="the run to export; with --run the exported folder")
  parser.add_argument("target", help="the folder to write; with --run a text")
  parser.add_argument("--run", action="store_true")
  parser.add_argument("--platforms", help="such as cpu,cuda,tpu; default: this machine's")
  parser.add_argument("--bytes", type=int, default=100, help="with --run: how many follow the text")
  args = parser.parse_args()
  if not args.run:
    write(args.source, pathlib.Path(args.target), args.platforms and args.platforms.split(","))
    return
  bits, made = run(pathlib.Path(args.source), args.target.encode(), args.bytes)
  print(f"{bits:.3f} bits per byte\n{args.target}{made.decode(errors='replace')}")


if __name__ == "__main__":
  main()
