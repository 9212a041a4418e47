"""Entropy coding of bytes with a model's probabilities: its bits are the nats of the basic evaluation, over ln 2.

A range coder needs the same probabilities, to the last bit, when it encodes and when it decodes. So both walk through
the text in the same way, with the same compiled step: it takes the byte before and gives the probabilities of the next
one. The windows are those of the evaluation; as many as `batch` are walked through side by side.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from megabyte_jax.config import ModelConfig, PerceiverARConfig
from megabyte_jax.config.model import check_bytes
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.evaluation import windows
from megabyte_jax.evaluation.windows import Window
from megabyte_jax.generation.sampling import check_finite
from megabyte_jax.models.build import Model, in_compute_dtype
from megabyte_jax.parallel.backend import platform

Code = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (bytes, or anything when decoding; probabilities) -> bytes


def encode(model: Model, text: np.ndarray, batch: int, on_bytes: Callable[[int], None] | None = None) -> np.ndarray:
  """The code words (uint32) of `text` (uint8).

  Args:
    batch: windows side by side; decoding needs the same number.
    on_bytes: called with the number of bytes that were coded since the last call.

  Raises:
    ConfigError: the model does not know all of the bytes.
    FloatingPointError: the model's probabilities are not finite.
  """
  check_bytes(text, model.config.vocab_size)
  encoder, family = constriction().stream.queue.RangeEncoder(), _family()

  def code(bytes_: np.ndarray, p_BV: np.ndarray) -> np.ndarray:
    encoder.encode(bytes_.astype(np.int32), family, p_BV)
    return bytes_

  _walk(model, text.copy(), batch, code, on_bytes)
  return encoder.get_compressed().astype("<u4")


def decode(
  model: Model, words: np.ndarray, length: int, batch: int, on_bytes: Callable[[int], None] | None = None
) -> np.ndarray:
  """The text of `length` bytes that `encode` made `words` of, with the same model and batch on the same device.

  Raises:
    DataError: the words are no such text's. Not all that are wrong are found out; keep a checksum.
  """
  decoder, family = constriction().stream.queue.RangeDecoder(words.astype(np.uint32)), _family()

  def code(_: np.ndarray, p_BV: np.ndarray) -> np.ndarray:
    try:
      return decoder.decode(family, p_BV).astype(np.uint8)
    except AssertionError as error:  # how the library tells of words that no text leads to
      raise DataError("the code does not fit the model's probabilities") from error

  text = np.zeros(length, np.uint8)
  _walk(model, text, batch, code, on_bytes)
  return text


def constriction() -> ModuleType:
  """The library of the range coder. Raises ConfigError where it is not installed."""
  try:
    return importlib.import_module("constriction")
  except ImportError as error:
    raise ConfigError("the range coder is missing; install it with: pip install constriction") from error


def _family() -> Any:
  return constriction().stream.model.Categorical(perfect=False)  # cost in bits: below one in ten thousand


def batch_size(length: int, config: ModelConfig, at_most: int) -> int:
  """How many windows of a text of `length` bytes to walk through side by side."""
  if isinstance(config, PerceiverARConfig):
    return 1  # each of its windows begins with the end of the one before
  return max(1, min(at_most, -(-length // config.context)))


def _walk(model: Model, text: np.ndarray, batch: int, code: Code, on_bytes: Callable[[int], None] | None) -> None:
  """Calls `code` for the next byte of each window, round after round, and puts what it returns into `text`."""
  graph, parameters = nnx.split(model)
  parameters, step = in_compute_dtype(model.config, parameters, batch), _step()
  for rows in _rounds(len(text), model.config, batch):
    state, first = _start(graph, parameters, text, rows, batch)
    previous_B = np.zeros(batch, np.int32)
    if first:
      previous_B[0] = text[rows[0].start + first - 1]
    for t in range(first, rows[0].length):
      state, p_BV = step(graph, model.first_level_at(t), parameters, state, previous_B)
      at = [row.start + t for row in rows if t < row.length]  # only the last window of a text is short
      p_BV = np.asarray(p_BV)[: len(at)]
      check_finite(p_BV)
      previous_B = np.zeros(batch, np.int32)
      text[at] = previous_B[: len(at)] = code(text[at], p_BV)
      if on_bytes:
        on_bytes(len(at))


def _rounds(length: int, config: ModelConfig, batch: int) -> Iterator[list[Window]]:
  rows = windows.windows_of(length, config, "basic")
  while batch_of_rows := list(itertools.islice(rows, batch)):
    yield batch_of_rows


def _start(
  graph: nnx.GraphDef, parameters: nnx.State, text: np.ndarray, rows: list[Window], batch: int
) -> tuple[Any, int]:
  """The state before the first byte that the windows score, and that byte's place in them."""
  config = nnx.merge(graph, parameters).config
  if not isinstance(config, PerceiverARConfig):
    return _empty_state(graph, parameters, batch), 0
  [row] = rows
  x_BT = np.zeros((1, config.context), np.int32)
  x_BT[0, : row.score_from] = text[row.start : row.start + row.score_from]
  return _state_after()(graph, parameters, x_BT, row.score_from, row.latent_start), row.score_from


@functools.partial(jax.jit, static_argnums=(0, 2))
def _empty_state(graph, parameters, batch):
  return nnx.merge(graph, parameters).start_bytes(batch)


@functools.cache
def _state_after():
  """The jitted (graph, parameters, x_BT, length, latent_start) -> state after the first `length` bytes of x."""

  def read(graph, parameters, x_BT, length, latent_start):
    return nnx.merge(graph, parameters).read_prompt(x_BT, length, latent_start)

  return _jit(read, static_argnums=0)


@functools.cache
def _step():
  """The jitted (graph, first_level, parameters, state, previous_B) -> (state, p_BV)."""

  def step(graph, first_level, parameters, state, previous_B):
    state, logits_BV = nnx.merge(graph, parameters).decode_byte(state, previous_B, first_level)
    return state, jax.nn.softmax(logits_BV.astype(jnp.float32))

  return _jit(step, static_argnums=(0, 1), donate_argnums=3)


def _jit(function: Callable, **options: Any) -> Callable:
  """jax.jit, with the same program in every process.

  Timing decides which matrix product XLA takes on a GPU, otherwise: another one in another process.
  """
  compiler = {"xla_gpu_autotune_level": 0} if platform() == "gpu" else None
  return jax.jit(function, compiler_options=compiler, **options)
