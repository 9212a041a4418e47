"""Exports models as config.json and safetensors, for other programs and to ship with this one, and reads them.

A folder holds `config.json`, `model-00001-of-0000N.safetensors`, ..., the index that says which tensor lies in which
file, and `files.json` with every file's size and checksum. Each layer's parameters are tensors of their own
(`levels.0.decoder.blocks.3.qkv.kernel`), though training stacks them.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from megabyte_jax.checkpoints.arrays import flat_arrays
from megabyte_jax.checkpoints.checksums import find_damage, write_digests
from megabyte_jax.checkpoints.saved_config import CONFIG_FILE, save_config, shipped_folder
from megabyte_jax.config import Config
from megabyte_jax.errors import CheckpointError, ConfigError, require
from megabyte_jax.files.atomic_file import final_path, removed_at_the_end
from megabyte_jax.files.json_files import read_json
from megabyte_jax.files.outputs import check_new_folder
from megabyte_jax.models.layers.quantised import require_floats

INDEX_FILE = "model.safetensors.index.json"
FORMAT = 1  # raised when older code could no longer read what this code writes
DTYPES = ("float32", "bfloat16")
_LAYERS = ".blocks."  # after it, a stacked parameter's name has no layer, an exported one's has


def is_exported(workdir: epath.PathLike) -> bool:
  """Returns whether `workdir` is an exported model, or names a shipped one, rather than the folder of a run."""
  return (epath.Path(shipped_folder(workdir)) / INDEX_FILE).exists()


def export_model(
  folder: str, config: Config, parameters: Any, step: int, dtype: str = "float32", max_file_bytes: int = 2**32
) -> None:
  """Writes a model to a new folder, which appears whole or not at all.

  Args:
    folder: of the export, on a disk; it must not exist yet, or be empty.
    config: of the run that trained it.
    parameters: nested dicts of float32 arrays.
    step: optimizer steps that they have had.
    dtype: float32 keeps every bit; bfloat16 halves the size.
    max_file_bytes: tensors are spread over files of at most so many bytes.

  Raises:
    ConfigError: the folder is not on a disk; it, or the one that a link leads to, holds something; one tensor is larger
      than a file may be; or weights are in 8 bits.
  """
  from safetensors.numpy import save_file  # noqa: PLC0415 - only exports need it

  require(dtype in DTYPES, f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
  require_floats(parameters, "an exported model")
  check_new_folder("the folder", folder)
  folder = final_path(folder)
  tensors = {name: np.asarray(array, jnp.dtype(dtype)) for name, array in _unstacked(parameters).items()}
  files = _spread(tensors, max_file_bytes)
  os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
  temporary = epath.Path(f"{folder.rstrip('/')}.{uuid.uuid4().hex[:12]}.tmp")
  with removed_at_the_end(temporary):
    temporary.mkdir()
    names = {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, start=1)}
    for name, file in names.items():
      save_file({tensor: tensors[tensor] for tensor in file}, temporary / name)
      os.chmod(temporary / name, 0o644)  # it was made for its owner alone
    metadata = {"format": FORMAT, "step": step, "total_size": sum(array.nbytes for array in tensors.values())}
    index = {"metadata": metadata, "weight_map": {tensor: name for name, file in names.items() for tensor in file}}
    (temporary / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    save_config(temporary, config)
    write_digests(temporary)
    if os.path.isdir(folder):
      os.rmdir(folder)
    temporary.rename(folder)


def read_exported(workdir: epath.PathLike, abstract_parameters: Any) -> tuple[Any, int]:
  """Reads the parameters of an exported or shipped model, in float32.

  Args:
    workdir: the folder, or `pretrained:NAME`.
    abstract_parameters: nested dicts of ShapeDtypeStructs with the shardings that they get.

  Returns:
    Nested dicts of arrays, and the step they are from.

  Raises:
    CheckpointError: a file is missing or altered, or the tensors are not those of the model.
  """
  from safetensors.numpy import load_file  # noqa: PLC0415

  folder = epath.Path(shipped_folder(workdir))
  if damage := find_damage(folder):
    raise CheckpointError(f"the exported model in {folder} is damaged: {damage}; export it again, or take another copy")
  metadata, files = _read_index(folder)
  tensors: dict[str, np.ndarray] = {}
  for name in files:
    tensors |= load_file(folder / name)
  arrays = _stacked(tensors)
  wanted = flat_arrays(abstract_parameters)
  differ = [
    f"{name} {list(arrays[name].shape) if name in arrays else '(absent)'} instead of "
    f"{list(wanted[name].shape) if name in wanted else 'nothing'}"
    for name in sorted(arrays.keys() | wanted.keys())
    if name not in arrays or name not in wanted or arrays[name].shape != wanted[name].shape
  ]
  if differ:
    raise CheckpointError(f"the tensors in {folder} are not those of its {CONFIG_FILE}: {'; '.join(differ[:8])}")
  placed = [jax.device_put(arrays[name].astype(leaf.dtype), leaf.sharding) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(abstract_parameters), placed), metadata["step"]


def _read_index(folder: epath.Path) -> tuple[dict[str, Any], list[str]]:
  """Reads an exported model's metadata and the names of its files. Raises CheckpointError as `read_exported` does."""
  index = read_json(folder / INDEX_FILE, CheckpointError, "export the model again, or take another copy")
  metadata, weight_map = index.get("metadata"), index.get("weight_map")
  if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
    found = metadata.get("format") if isinstance(metadata, dict) else None
    raise CheckpointError(f"{folder} has format {found}, not {FORMAT}; export it again")
  names = weight_map.values() if isinstance(weight_map, dict) else [None]
  if type(metadata.get("step")) is not int or not all(isinstance(name, str) for name in names):
    raise CheckpointError(f"{folder / INDEX_FILE} has no step, or no weight_map of file names; export the model again")
  return metadata, sorted(set(names))


def _unstacked(parameters: Any) -> dict[str, Any]:
  """Returns {name: array} with each layer's parameters apart."""
  apart: dict[str, Any] = {}
  for name, array in flat_arrays(parameters).items():
    before, stacked, after = name.partition(_LAYERS)
    if stacked:
      apart |= {f"{before}{_LAYERS}{layer}.{after}": array[layer] for layer in range(len(array))}
    else:
      apart[name] = array
  return apart


def _stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Undoes `_unstacked`; layers that are missing in the middle leave too few, which shapes tell."""
  layers: dict[str, dict[int, np.ndarray]] = {}
  arrays = {}
  for name, tensor in tensors.items():
    if match := re.fullmatch(rf"(.*{re.escape(_LAYERS)})(\d+)\.(.*)", name):
      layers.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
    else:
      arrays[name] = tensor
  return arrays | {name: np.stack([each[i] for i in sorted(each)]) for name, each in layers.items()}


def _spread(tensors: Mapping[str, np.ndarray], max_file_bytes: int) -> list[list[str]]:
  """Returns the names of the tensors of each file, in order."""
  room = max_file_bytes - (1 << 16)  # for the file's own header
  largest = max(tensors, key=lambda name: tensors[name].nbytes)
  if tensors[largest].nbytes > room:
    raise ConfigError(f"{largest} alone takes {tensors[largest].nbytes:,} bytes; allow files of more than that")
  files: list[list[str]] = [[]]
  size = 0
  for name, tensor in tensors.items():
    if size + tensor.nbytes > room:
      files.append([])
      size = 0
    files[-1].append(name)
    size += tensor.nbytes
  return files
