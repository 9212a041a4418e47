"""Compressed files: bytes coded without loss with a trained model's probabilities, and what a file says of itself."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from flax import nnx

from megabyte_jax.config.parsing import mapping_from_dataclass
from megabyte_jax.errors import ConfigError, DataError, require
from megabyte_jax.generation import entropy_coding
from megabyte_jax.models.build import Model
from megabyte_jax.models.parameters import compute_dtype

FORMAT = 2  # raised when older code could no longer read what this code writes
BATCH = 64  # windows side by side; more make no file smaller
_MAGIC = b"MBJAX\0\r\n"  # the line end shows that a transfer as text has changed the file
_DIGEST = 16  # bytes of SHA-256, over the whole file before it


@dataclasses.dataclass(frozen=True)
class Header:
  """What a compressed file says of itself.

  Attributes:
    length, digest: bytes of the original, and its checksum.
    step: of the checkpoint.
    batch: windows side by side.
    model: digest of the model's config and parameters.
    dtype, device, cores, xla_flags, jax, jaxlib, flax, constriction: what else decides the last bit of a probability,
      or its code.
  """

  length: int
  digest: str
  step: int
  batch: int
  model: str
  dtype: str
  device: str
  cores: int
  xla_flags: str
  jax: str
  jaxlib: str
  flax: str
  constriction: str


def compress(
  model: Model, text: bytes, *, step: int = 0, batch: int = BATCH, on_bytes: Callable[[int], None] | None = None
) -> bytes:
  """`text` compressed with the probabilities of `model`.

  Args:
    step: of the checkpoint, for messages.
    batch: windows side by side, at most.
    on_bytes: called with the number of bytes done since the last call.

  Raises:
    ConfigError: the model does not know all of the bytes.
    FloatingPointError: the model's probabilities are not finite.
  """
  require(batch >= 1, f"the number of windows side by side is {batch}; it must be at least 1")
  data = np.frombuffer(text, np.uint8)
  batch = entropy_coding.batch_size(len(data), model.config, batch)
  header = Header(len(text), _digest(text).hex(), step, batch, **_circumstances(model))
  fields = json.dumps({"format": FORMAT, **dataclasses.asdict(header)}, separators=(",", ":")).encode()
  body = (
    _MAGIC + len(fields).to_bytes(4, "little") + fields + entropy_coding.encode(model, data, batch, on_bytes).tobytes()
  )
  return body + _digest(body)


def decompress(model: Model, packed: bytes, *, on_bytes: Callable[[int], None] | None = None) -> bytes:
  """The text that `compress` made `packed` of.

  Raises:
    DataError: `packed` is no such file, cut short or altered, or the text did not come out as it was.
    ConfigError: it was compressed with another model or under other circumstances.
  """
  header, words = read(packed)
  here = _circumstances(model)
  other = [f"{key} {_word(was)} (here {_word(here[key])})" for key, was in _shown(header, here) if was != here[key]]
  if other:
    at = f", step {header.step} of its run" if any(text.startswith("model") for text in other) else ""
    raise ConfigError(f"it was compressed with another {', '.join(other)}{at}; it can be decompressed with these alone")
  text = entropy_coding.decode(model, words, header.length, header.batch, on_bytes).tobytes()
  if _digest(text).hex() != header.digest:
    raise DataError("what came out is not what was compressed: this machine computes other probabilities")
  return text


def read(packed: bytes) -> tuple[Header, np.ndarray]:
  """The header and the code words of a compressed file. Raises DataError where it is none, cut short or altered."""
  if packed[: len(_MAGIC)] != _MAGIC:
    raise DataError("this is no file that megabyte_jax.compress wrote")
  body, digest = packed[:-_DIGEST], packed[-_DIGEST:]
  if _digest(body) != digest:
    raise DataError("the compressed file is cut short or altered")
  start = len(_MAGIC) + 4
  end = start + int.from_bytes(body[len(_MAGIC) : start], "little")
  fields = json.loads(body[start:end])
  if fields.pop("format") != FORMAT:
    raise DataError("the compressed file was written by another version of megabyte_jax; decompress it with that one")
  return Header(**fields), np.frombuffer(body[end:], "<u4")


def _digest(data: bytes) -> bytes:
  return hashlib.sha256(data).digest()[:_DIGEST]


def _shown(header: Header, here: dict[str, Any]) -> list[tuple[str, Any]]:
  return [(key, getattr(header, key)) for key in here]


def _word(value: Any) -> str:
  return "none" if value == "" else str(value)


def _circumstances(model: Model) -> dict[str, Any]:
  """The fields of `Header` that the machine and the model decide."""
  device = jax.devices()[0]
  cores = 0
  if device.platform == "cpu":  # how many share a matrix product can decide the order of its sums
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
  return {
    "model": fingerprint(model),
    "dtype": compute_dtype(model.config).name,
    "device": _processor() if device.platform == "cpu" else device.device_kind,
    "cores": cores,
    "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "flax": flax.__version__,
    "constriction": importlib.metadata.version("constriction"),
  }


def _processor() -> str:
  with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # of Linux
    if found := re.search(r"model name\s*: (.*)", file.read()):  # of x86
      return found[1]
  return platform.processor() or platform.machine()


def fingerprint(model: Model) -> str:
  """Digest of a model's config and parameters, 16 hexadecimal digits."""
  sha = hashlib.sha256(json.dumps(mapping_from_dataclass(model.config), sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
    sha.update(jax.tree_util.keystr(path).encode())
    sha.update(np.ascontiguousarray(leaf).view(np.uint8).data)
  return sha.hexdigest()[:16]
