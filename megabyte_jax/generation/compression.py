"""Makes compressed files: bytes coded without loss with a trained model's probabilities, and a header.

A file is `_MAGIC`, the length of the header (4 bytes, little-endian), the header as JSON, the code and a digest of all
before it. The code is that of entropy_coding.py; where its file would not be smaller, the bytes stand as they are and
the header has no `coding`. So a file is at most 128 bytes larger than what it is made of.
"""

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

from megabyte_jax.config import ModelConfig
from megabyte_jax.config.parsing import dataclass_from_mapping, mapping_from_dataclass
from megabyte_jax.errors import ConfigError, DataError, require
from megabyte_jax.files.json_files import parse_json
from megabyte_jax.generation import entropy_coding
from megabyte_jax.models.build import Model, for_windows
from megabyte_jax.models.layers.quantised import require_floats
from megabyte_jax.models.parameters import compute_dtype

FORMAT = 2  # raised when older code could no longer read what this code writes
BATCH = 64  # windows side by side; more make no file smaller
WINDOW = 2048  # bytes; longer ones make few files smaller, and each byte takes longer
_MAGIC = b"MBJAX\0\r\n"  # the line end shows that a transfer as text has changed the file
_REMEDY = "get a whole copy of it, or compress the original again"
_WORD = 80  # letters of a field that a message shows
_DIGEST = 16  # bytes of SHA-256, over the whole file before it

# How a message names a circumstance that differs, and what to do; the others are versions.
_SAID = {
  "model": "with the model {}",
  "dtype": "in {}",
  "device": "on the device {}",
  "cores": "on {} CPU cores",
  "xla_flags": "with XLA_FLAGS {}",
  "host": "with NumPy's instruction set {}",
}
_REMEDIES = {
  "model": "give the --workdir and --step with which it was compressed",
  "dtype": "use a machine of that kind",
  "device": "use a machine of that kind",
  "cores": "use a machine with as many",
  "xla_flags": "set XLA_FLAGS to the same",
  "host": "use a machine of that kind",
}


@dataclasses.dataclass(frozen=True)
class Coding:
  """The settings with which a file was coded.

  Attributes:
    step: of the checkpoint.
    batch: windows side by side.
    window: bytes of a window, at most.
    adapt: whether the probabilities were adapted to the file.
    model: digest of the model's config and parameters.
    dtype, device, cores, xla_flags, jax, jaxlib, flax, numpy, constriction: what else decides the last bit of a
      probability, or its code.
    host: digest of the instruction set that NumPy uses, in which probabilities are adapted, whatever the device.
  """

  step: int
  batch: int
  window: int
  adapt: bool
  model: str
  dtype: str
  device: str
  cores: int
  xla_flags: str
  jax: str
  jaxlib: str
  flax: str
  numpy: str
  host: str
  constriction: str


@dataclasses.dataclass(frozen=True)
class Header:
  """The header of a compressed file.

  Attributes:
    length, digest: bytes of the original, and its checksum.
    coding: None where all bytes are stored as they are, which no model is needed for.
  """

  length: int
  digest: str
  coding: Coding | None = None


def compress(
  model: Model,
  text: bytes,
  *,
  step: int = 0,
  batch: int = BATCH,
  window: int = WINDOW,
  adapt: bool = True,
  on_bytes: Callable[[int], None] | None = None,
) -> bytes:
  """Returns `text` compressed with the probabilities of `model`, or stored as it is where that is no larger.

  Args:
    model: gives the probabilities.
    text: any bytes.
    step: of the checkpoint, for messages.
    batch: windows side by side, at most.
    window: bytes of a window at most, where the model can do with less than its context.
    adapt: adapts the probabilities to the file as it goes, which makes it smaller; without, the bits are those of the
      basic evaluation, if windows have the length of the context.
    on_bytes: called with the number of bytes done since the last call.

  Raises:
    ConfigError: the model does not know all of the bytes, or its weights are in 8 bits.
    FloatingPointError: the model's probabilities are not finite.
  """
  require_floats(nnx.state(model), "compression")
  require(batch >= 1, f"the number of windows side by side is {batch}; it must be at least 1")
  require(window >= 1, f"the window has {window} bytes; it must have at least 1")
  data = np.frombuffer(text, np.uint8)
  short = for_windows(model, window)
  batch = entropy_coding.batch_size(len(data), short.config, batch)
  header = Header(len(text), _digest(text).hex())
  code = entropy_coding.encode(short, data, batch, on_bytes, adapt=adapt)
  stored = _file(header, text)
  coded = _file(dataclasses.replace(header, coding=Coding(step, batch, window, adapt, **_circumstances(model))), code)
  return coded if entropy_coding.pays(len(coded), len(stored)) else stored


def _file(header: Header, code: bytes) -> bytes:
  fields: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(header)}
  if header.coding is None:
    del fields["coding"]
  text = json.dumps(fields, separators=(",", ":")).encode()
  body = _MAGIC + len(text).to_bytes(4, "little") + text + code
  return body + _digest(body)


def decompress(model: Model | None, packed: bytes, *, on_bytes: Callable[[int], None] | None = None) -> bytes:
  """Returns the text that `compress` made `packed` of.

  Args:
    model: the one that it was compressed with; None will do where all is stored.
    packed: a compressed file.
    on_bytes: called with the number of bytes done since the last call.

  Raises:
    DataError: `packed` is not such a file, cut short or altered, or the text did not come out as it was.
    ConfigError: it was compressed with another model or under other circumstances.
  """
  header, code = read(packed)
  if (coding := header.coding) is None:
    text = code
  else:
    if model is None:
      raise ConfigError("it was compressed with a model; give the --workdir with which it was compressed")
    _check_circumstances(coding, _circumstances(model))
    short = for_windows(model, coding.window)
    text = entropy_coding.decode(short, code, header.length, coding.batch, on_bytes, adapt=coding.adapt).tobytes()
  if len(text) != header.length or _digest(text).hex() != header.digest:
    why = "this machine computes other probabilities" if header.coding else f"the file is altered; {_REMEDY}"
    raise DataError(f"what came out is not what was compressed: {why}")
  return text


def _check_circumstances(coding: Coding, here: dict[str, Any]) -> None:
  """Raises ConfigError where the model or the machine are not those of a file; says what to do about each."""
  was = {key: getattr(coding, key) for key in here}
  other = [key for key in here if was[key] != here[key]]
  if "device" in other and not (was["cores"] and here["cores"]):
    other = [key for key in other if key != "cores"]  # they count on a CPU alone
  if not other:
    return
  said = _SAID | ({"cores": "on {} CPU core"} if was["cores"] == 1 else {})
  differ = [said.get(key, f"with {key} {{}}").format(_word(was[key])) + f" (here {_word(here[key])})" for key in other]
  if "model" in other:
    differ[other.index("model")] += f" of step {coding.step} of its run"
  taskset = f"begin the command with `taskset -c 0-{was['cores'] - 1}` (Linux)"
  known = _REMEDIES | ({"cores": taskset} if here["cores"] > was["cores"] > 0 else {})
  remedies = dict.fromkeys(known.get(key, "install that version") for key in other)
  if "model" in other:
    remedies = {_REMEDIES["model"]: None}  # the rest may be right then, or is said next
  raise ConfigError(f"it was compressed {', '.join(differ)}; {', '.join(remedies)}")


def stored_bytes(packed: bytes, config: ModelConfig) -> int:
  """Returns how many bytes of the original a compressed file holds as they are. Raises DataError as `read` does."""
  header, code = read(packed)
  if header.coding is None:
    return header.length
  config = config.shortened(header.coding.window)
  parts = entropy_coding.split(code, header.length, config, header.coding.batch)
  return sum(part.stop - part.start for part in parts if part.words is None)


def what_bits_are_for(packed: bytes, config: ModelConfig) -> str:
  """Returns bits per byte and bytes of header of a compressed file in words, and what is stored in it as it is."""
  header, code = read(packed)
  stored = stored_bytes(packed, config)
  if not header.length:
    return ""
  if stored == header.length:
    return ": stored as they are, for the model makes them no smaller"
  said = f": {8 * len(code) / header.length:.4f} bits per byte and {len(packed) - len(code)} bytes of header"
  return said + (f"; {stored:,} bytes are stored as they are, for the model makes them no smaller" if stored else "")


def is_compressed(data: bytes) -> bool:
  """Tells whether bytes begin as `compress` has its files begin."""
  return data[: len(_MAGIC)] == _MAGIC


def read(packed: bytes) -> tuple[Header, bytes]:
  """Returns the header and the code of a compressed file.

  Raises:
    DataError: it is none, cut short, altered or of another version, or its header says what cannot be.
  """
  if not is_compressed(packed):
    raise DataError("this is not a file that `megabyte_jax compress` wrote")
  body, digest = packed[:-_DIGEST], packed[-_DIGEST:]
  if _digest(body) != digest:
    raise DataError(f"the compressed file is cut short or altered; {_REMEDY}")
  start = len(_MAGIC) + 4
  end = start + int.from_bytes(body[len(_MAGIC) : start], "little")
  fields = parse_json(body[start:end], "the header of the compressed file", DataError, _REMEDY)
  if fields.pop("format", None) != FORMAT:
    raise DataError("the compressed file was written by another version of megabyte_jax; decompress it with that one")
  try:
    header = dataclass_from_mapping(Header, fields, "header")
    for name in ("batch", "window"):
      require(getattr(header.coding, name, 1) >= 1, f"header.coding.{name} must be at least 1")
    require(header.length >= 0, "header.length must not be negative")
  except ConfigError as error:
    raise DataError(f"the compressed file has a header that cannot be: {error}; {_REMEDY}") from error
  return header, body[end:]


def _digest(data: bytes) -> bytes:
  return hashlib.sha256(data).digest()[:_DIGEST]


def _word(value: Any) -> str:
  return "none" if value == "" else " ".join(str(value).split())[:_WORD]


def _circumstances(model: Model) -> dict[str, Any]:
  """The fields of `Coding` that the machine and the model decide."""
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
    "numpy": np.__version__,
    "host": _instruction_set(),
    "constriction": importlib.metadata.version("constriction"),
  }


def _processor() -> str:
  with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # of Linux
    if found := re.search(r"model name\s*: (.*)", file.read()):  # of x86
      return found[1]
  return platform.processor() or platform.machine()


def _instruction_set() -> str:
  """Computes a digest of the instructions that NumPy uses; one processor's name stands for several sets of them."""
  return _digest(repr(np.show_config(mode="dicts").get("SIMD Extensions")).encode()).hex()[:8]


def fingerprint(model: Model) -> str:
  """Computes a digest of a model's config and parameters, 16 hexadecimal digits."""
  sha = hashlib.sha256(json.dumps(mapping_from_dataclass(model.config), sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
    sha.update(jax.tree_util.keystr(path).encode())
    sha.update(np.ascontiguousarray(leaf).view(np.uint8).data)
  return sha.hexdigest()[:16]
