"""Samples bytes with a cache per level: one step of the local model a byte, one of the global model a patch.

When the context is full, its last half is read again and generation goes on (evaluation/windows.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megabyte_jax.config import ModelConfig
from megabyte_jax.config.model import check_bytes, token_dtype
from megabyte_jax.errors import ConfigError, require
from megabyte_jax.evaluation import windows
from megabyte_jax.models.build import Model, for_windows, in_compute_dtype
from megabyte_jax.models.layers.quantised import check_weights
from megabyte_jax.parallel.activation_layout import lay_out, mesh_axes, refuse_explicit_axes
from megabyte_jax.parallel.backend import platform
from megabyte_jax.parallel.sharding import check_mesh

_CHUNK_BYTES = 64  # bytes decoded between two looks at the result
_PROMPT_BYTES = 1024  # a prompt is read in buffers of this length, twice it, four times it, ... up to the context


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The settings by which a byte is sampled.

  Attributes:
    temperature: logits are divided by it; 0 picks the most probable byte.
    top_k: only the k most probable bytes; 0 all.
    top_p: only the most probable bytes that together reach this probability; 1 all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    for name in ("temperature", "top_p"):
      value = getattr(self, name)
      require(isinstance(value, numbers.Real), f"{name} is {value!r}; it must be a number")
    object.__setattr__(self, "top_k", whole_number("top_k", self.top_k))
    require(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative")
    require(self.top_k >= 0, f"top_k is {self.top_k}; it must not be negative")
    require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be in (0, 1]")


def whole_number(name: str, value: Any) -> int:
  """Returns an integer of any type, NumPy's and JAX's among them, as Python's own, which does not overflow.

  Raises:
    ConfigError: it is not a whole number; names it as `name`.
  """
  try:
    return operator.index(value)
  except TypeError as error:
    raise ConfigError(f"{name} is {value!r}; it must be a whole number") from error


def pick_byte(logits_V: jax.Array, noise_V: jax.Array, sampling: Sampling) -> jax.Array:
  """Picks one byte from float32 logits and `gumbel_noise`, int32 scalar; of equal logits the lower byte ranks first."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_V).astype(jnp.int32)
  if sampling.temperature != 1:  # the largest becomes 0, so that no other can overflow to the same as it
    lowest = float(jnp.finfo(jnp.float32).tiny)
    logits_V = (logits_V - jnp.max(logits_V)) / max(sampling.temperature, lowest)
  if not 0 < sampling.top_k < logits_V.shape[0] and sampling.top_p == 1:
    return jnp.argmax(logits_V + noise_V).astype(jnp.int32)
  ranked_V = jnp.argsort(logits_V, descending=True, stable=True)
  logits_V = logits_V[ranked_V]
  if sampling.top_k:
    logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < sampling.top_k, logits_V, -jnp.inf)
  p_V = jax.nn.softmax(logits_V)
  before_V = jnp.cumsum(p_V) - p_V  # a byte stays if those that rank before it do not reach top_p already
  logits_V = jnp.where(before_V < sampling.top_p, logits_V, -jnp.inf)
  return ranked_V[jnp.argmax(logits_V + noise_V[ranked_V])].astype(jnp.int32)


def gumbel_noise(key: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
  """Returns noise with which argmax(logits + noise) samples their softmax; float32 [V], of key and position alone."""
  return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32)


def check_finite(values: np.ndarray) -> None:
  """Raises FloatingPointError where one of a model's probabilities, or a logarithm of one, is not a finite number."""
  if not np.isfinite(values).all():
    raise FloatingPointError("the model's probabilities are not finite numbers; take another checkpoint")


@functools.partial(jax.jit, static_argnums=0)
def _read_prompt(graph, parameters, x_BT, length, latent_start):
  return _lay_out(nnx.merge(graph, parameters).read_prompt(x_BT, length, latent_start))


def row_spec(ndim: int) -> PartitionSpec:
  """Returns the partition spec of decoding's state: rows over `data`, heads of the caches over `tensor`.

  Rows are not spread over `fsdp`, where the parameters lie: each step sums a few activations and moves no parameters.
  """
  return PartitionSpec(*((None, "data", None, None, "tensor", None) if ndim == 6 else ("data",) if ndim else ()))


def _lay_out(tree):
  return jax.tree.map(lambda x: lay_out(x, row_spec(x.ndim)), tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode_chunk(
  graph: nnx.GraphDef,
  sampling: Sampling,
  size: int,
  parameters: nnx.State,
  state: Any,
  x_BT: jax.Array,
  known: jax.Array,
  offset: jax.Array,
  patches: int | jax.Array,
  keys_B: jax.Array,
) -> tuple[Any, jax.Array, jax.Array]:
  """Decodes `patches` patches, in all at most `size` bytes; bytes before `known` are taken from x instead.

  On a GPU it decodes `size` bytes whatever `patches` is; with fewer of them the state is of no use afterwards.
  Positions count from the window's start, which is byte `offset` of the text.

  Args:
    graph, parameters: the model.
    state: of its decoding; donated.
    x_BT: the window so far.
    keys_B: random keys, one of each sample.

  Returns:
    The state afterwards; bytes [B, size], int32, and their nats, float32: the first ones are those decoded.
  """
  model = nnx.merge(graph, parameters)
  state, x_BT, keys_B = _lay_out((state, x_BT, keys_B))
  B, S = x_BT.shape[0], model.config.patch_bytes

  first = state.position
  noise = jax.vmap(jax.vmap(gumbel_noise, in_axes=(None, 0, None)), in_axes=(0, None, None))
  noise_BCV = noise(keys_B, offset + first + jnp.arange(size), model.config.vocab_size)  # of the whole chunk at once

  def pick(logits_BV, position):
    noise_BV = jax.lax.dynamic_index_in_dim(noise_BCV, position - first, 1, keepdims=False)
    sampled_B = jax.vmap(functools.partial(pick_byte, sampling=sampling))(logits_BV, noise_BV)
    given_B = jax.lax.dynamic_index_in_dim(x_BT, jnp.minimum(position, x_BT.shape[1] - 1), 1, keepdims=False)
    return jnp.where(position < known, given_B.astype(jnp.int32), sampled_B)

  def one_patch(_, carry):
    state, bytes_BC, nats_BC = carry
    at = state.position - first
    state, bytes_BS, logits_BSV = model.decode_patch(_lay_out(state), pick)
    log_p_BSV = jax.nn.log_softmax(logits_BSV)
    nats_BS = -jnp.take_along_axis(log_p_BSV, bytes_BS[..., None], axis=-1)[..., 0]
    put = jax.lax.dynamic_update_slice_in_dim
    return state, put(bytes_BC, bytes_BS, at, axis=1), put(nats_BC, nats_BS, at, axis=1)

  empty = (state, jnp.zeros((B, size), jnp.int32), jnp.zeros((B, size), jnp.float32))
  if platform() == "gpu":  # there the host waits before each round, unless it knows how many there are
    patches = size // S
  state, bytes_BC, nats_BC = jax.lax.fori_loop(0, patches, one_patch, empty)
  if mesh_axes():  # for the host
    bytes_BC, nats_BC = jax.lax.with_sharding_constraint((bytes_BC, nats_BC), PartitionSpec())
  return _lay_out(state), bytes_BC, nats_BC


def chunk_bytes(config: ModelConfig) -> int:
  """Returns the bytes of a chunk: whole patches."""
  patch = config.patch_bytes
  return max(_CHUNK_BYTES // patch, 1) * patch


Stop = bytes | Callable[[Any], int | None]


@dataclasses.dataclass(frozen=True)
class Generated:
  """Generated bytes.

  Attributes:
    bytes_: uint8 [samples, n]; tokens, uint16 or uint32, of a model of subwords.
    nats: float32 [samples, n], -ln p of each byte (at temperature 1).
    lengths: int64 [samples], the bytes of each sample up to its stop; what follows in its row is of no use.
  """

  bytes_: np.ndarray
  nats: np.ndarray
  lengths: np.ndarray


def generate(
  model: Model,
  prompt: bytes | np.ndarray = b"",
  num_bytes: int = 256,
  *,
  num_samples: int = 1,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop: Stop | None = None,
  on_bytes: Callable[[np.ndarray], None] | None = None,
  weights: str = "",
) -> Generated:
  """Continues `prompt`, `num_samples` times; on the mesh where the parameters lie.

  Args:
    prompt: of any length; what the context cannot hold is forgotten from the front, but a recurrent model reads all. Of
      a model of subwords the tokens, an array; generation/subword_text.py turns texts into them and back.
    num_bytes: to generate, of any number; tokens, of a model of subwords.
    seed: 0 to 2**32 - 1; the randomness of a byte depends on it, the sample's number and the byte's place alone.
    stop: ends a sample early: bytes, which are its last then, or a function of a sample's bytes so far, prompt
      excluded, that returns how many of them to keep, or None to go on; a model of subwords takes a function of tokens.
    on_bytes: called with new bytes, uint8 [samples, m], as they come.
    weights: "int8" decodes with matrices in 8 bits, prompt included, of which half as many bytes are read
      (models/layers/quantised.py); the model itself stays as it is.

  Raises:
    ConfigError: a number or type makes no sense, the model does not know a byte of the prompt or does not fit its mesh.
    FloatingPointError: the model's probabilities are not finite.
  """
  dtype = token_dtype(model.config.vocab_size)
  if dtype == np.uint8:
    require(
      isinstance(prompt, (bytes, bytearray)),
      f"the prompt is of type {type(prompt).__name__}; give bytes, such as text.encode()",
    )
    prompt = np.frombuffer(prompt, np.uint8)
  else:
    require(
      isinstance(prompt, np.ndarray) and not isinstance(stop, bytes),
      "the model reads subwords; give the prompt as an array of tokens and `stop` as a function of tokens, or take "
      "generate_text of generation/subword_text.py",
    )
  num_bytes, seed = whole_number("the number of bytes to generate", num_bytes), whole_number("the seed", seed)
  num_samples = whole_number("the number of samples", num_samples)
  require(num_bytes < 2**31, f"the number of bytes to generate is {num_bytes}; it must be at most {2**31 - 1}")
  require(num_bytes >= 0, f"the number of bytes to generate is {num_bytes}; it must not be negative")
  require(num_samples >= 1, f"the number of samples is {num_samples}; it must be at least 1")
  require(0 <= seed < 1 << 32, f"the seed is {seed}; it must be at least 0 and below {1 << 32:,}")
  require(stop != b"", "the bytes to stop at are empty")
  check_weights(weights)
  if platform() == "cpu" and not _mesh_of(nnx.state(model)):  # each step reads the whole cache there
    model = for_windows(model, max(_PROMPT_BYTES, 1 << max(len(prompt) + num_bytes - 1, 0).bit_length()))
  graph, parameters = nnx.split(model)
  for parameter in jax.tree.leaves(parameters):
    refuse_explicit_axes(parameter, "the model's parameters lie")
  config, context = model.config, model.config.context
  S, size = config.patch_bytes, chunk_bytes(config)
  mesh = _mesh_of(parameters)
  rows = num_samples
  if mesh:  # prompts are spread over data and fsdp: rows that nobody asked for fill up what is not whole
    rows += -rows % (mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1))
    check_mesh(mesh, config, rows)
  done, total = len(prompt), len(prompt) + num_bytes
  room = max(S + context, _prompt_length(total, model))  # for a last patch, and a last window or a longer prompt
  text = np.zeros((rows, total + room), dtype)
  text[:, :done] = prompt
  check_bytes(text[:, :done], config.vocab_size)
  nats = np.zeros((rows, total), np.float32)
  ends = np.full(num_samples, total)
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    parameters = in_compute_dtype(config, parameters, rows, weights)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(rows))
    while done < ends.max():
      state = None  # the next one needs the memory
      offset, limit, latent_start = windows.generation_window(done, config)
      known = done - offset
      read = _prompt_length(known, model)
      x_BT = jnp.asarray(text[:, offset : offset + max(read, context)], jnp.int32)
      state = _read_prompt(graph, parameters, x_BT[:, :read], known, latent_start)
      x_BT = x_BT[:, :context]
      at = known // model.alignment * model.alignment  # bytes from here to `known` are decoded as given
      # The newest: its bytes are looked at only when the device has the next to go on with.
      chunk: tuple[int, int, list[jax.Array]] | None = None
      while chunk or (at < limit and offset + at < ends.max()):
        before, chunk = chunk, None
        if at < limit and offset + at < ends.max():
          patches = min(size // S, (limit - at) // S, -(-(total - offset - at) // S))
          state, *arrays = decode_chunk(graph, sampling, size, parameters, state, x_BT, known, offset, patches, keys_B)
          chunk = (offset + at, offset + at + patches * S, arrays)
          at += patches * S
        if before is None or before[0] >= ends.max():
          continue
        begin, end, (bytes_BC, nats_BC) = before
        first, last = max(begin, done), min(end, total)
        text[:, first:last] = np.asarray(bytes_BC)[:, first - begin : last - begin]
        nats[:, first:last] = np.asarray(nats_BC)[:, first - begin : last - begin]
        check_finite(nats[:, first:last])
        done = max(last, done)
        if stop is not None:
          _find_ends(stop, text, ends, len(prompt), first, done)
        if on_bytes and min(last, ends.max()) > first:
          on_bytes(text[:num_samples, first : min(last, ends.max())])
  made = slice(len(prompt), int(ends.max()))
  return Generated(text[:num_samples, made], nats[:num_samples, made], ends - len(prompt))


def _prompt_length(known: int, model: Model) -> int:
  """Bytes to read so that the first `known` are among them, one of few numbers: each is compiled for."""
  if model.config.num_latents:  # the prefix has a cache of the context's size
    return model.config.context
  length = max(_PROMPT_BYTES, 1 << max(known - 1, 0).bit_length())
  if model.config.recurrent:  # it reads the text from its beginning
    return max(length, model.config.context)
  return min(-(-length // model.alignment) * model.alignment, model.config.context)


def _find_ends(stop: Stop, text: np.ndarray, ends: np.ndarray, start: int, first: int, done: int) -> None:
  """Notes the ends of samples that stop within their newest bytes, [first, done); generated ones begin at `start`."""
  for b in np.flatnonzero(ends > first):
    if isinstance(stop, bytes):
      since = max(start, first - len(stop) + 1)
      found = text[b, since:done].tobytes().find(stop)
      length = since - start + found + len(stop) if found >= 0 else None
    else:
      length = stop(text[b, start:done] if text.dtype != np.uint8 else text[b, start:done].tobytes())
    if length is not None:
      ends[b] = start + min(max(length, 0), done - start)


def _mesh_of(parameters: nnx.State) -> Mesh | None:
  """The mesh that the parameters are spread over, None where they lie on one device."""
  sharding = jax.tree.leaves(parameters)[0].sharding
  mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
  return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None
