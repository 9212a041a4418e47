"""Codes bytes with a model's probabilities: the bits are the nats of the basic evaluation, over ln 2.

A range coder needs the same probabilities, to the last bit, when it encodes and when it decodes. So both walk through
the text in the same way, with the same compiled step: it takes the byte before and gives the probabilities of the next
one. The windows are those of the evaluation; as many as `batch` are walked through side by side.

A recurrent model's windows are segments of one text, and its memory goes on from one to the next. It begins anew after
a block whose bytes are stored as they are: what decodes them does not walk through them. So does adaptation, which with
`adapt` fits the probabilities to the text as it goes (adaptation.py) and makes the code shorter than the nats.

The code consists of blocks, of 64 KiB or of one round of windows, whichever is more. Each begins with a number of four
bytes: how many code words follow, or `_STORED`, after which the block's bytes follow as they are. A block is stored
where its code words would be no fewer bytes, so that a text which the model knows nothing of grows by 0.01%.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from megabyte_jax.config import ModelConfig
from megabyte_jax.config.model import check_bytes
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.evaluation import windows
from megabyte_jax.evaluation.windows import Window
from megabyte_jax.generation.adaptation import VOCABULARY, Adaptation
from megabyte_jax.generation.sampling import check_finite
from megabyte_jax.models.build import Model, in_compute_dtype
from megabyte_jax.parallel.backend import platform

Code = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (bytes, or anything when decoding; probabilities) -> bytes
_BLOCK = 1 << 16  # bytes at least, unless the text ends: so that what a block begins and ends with weighs little
_STORED = 0xFFFFFFFF


class Part(NamedTuple):
  """A block of a code.

  Attributes:
    start, stop: its bytes of the text.
    rounds: its windows.
    words: the code words, or None where the bytes are stored.
    stored: the bytes as they are, then.
  """

  start: int
  stop: int
  rounds: list[list[Window]]
  words: np.ndarray | None
  stored: bytes


def encode(
  model: Model, text: np.ndarray, batch: int, on_bytes: Callable[[int], None] | None = None, *, adapt: bool = False
) -> bytes:
  """Returns the code of `text` (uint8).

  Args:
    model: gives the probabilities.
    text: to be coded.
    batch: windows side by side; decoding needs the same number.
    on_bytes: called with the number of bytes that were coded since the last call.
    adapt: adapts the probabilities to the text; decoding must do the same.

  Raises:
    ConfigError: the model does not know all of the bytes.
    FloatingPointError: the model's probabilities are not finite.
  """
  check_bytes(text, model.config.vocab_size)
  walk, text, code, family = _Walk(model, batch, len(text) if adapt else 0), text.copy(), [], _family()
  for start, stop, rounds in _blocks(len(text), model.config, batch):
    encoder = constriction().stream.queue.RangeEncoder()

    def put(bytes_: np.ndarray, p_BV: np.ndarray, encoder: Any = encoder) -> np.ndarray:
      encoder.encode(bytes_.astype(np.int32), family, p_BV)
      return bytes_

    walk(text, rounds, put, on_bytes)
    words = encoder.get_compressed().astype("<u4")
    if pays(words.nbytes, stop - start):
      code += [len(words).to_bytes(4, "little"), words.tobytes()]
    else:
      code += [_STORED.to_bytes(4, "little"), text[start:stop].tobytes()]
      walk.forget()
  return b"".join(code)


def pays(coded: int, stored: int) -> bool:
  """Returns True where so many bytes of code are better than so many stored ones."""
  return coded < stored


def decode(
  model: Model,
  code: bytes,
  length: int,
  batch: int,
  on_bytes: Callable[[int], None] | None = None,
  *,
  adapt: bool = False,
) -> np.ndarray:
  """Returns the text of `length` bytes that `encode` made `code` of, with the same arguments on the same device.

  Raises:
    DataError: the code is not such a text's. Not all that is wrong is found out; keep a checksum.
  """
  parts, family = split(code, length, model.config, batch), _family()
  walk, text = _Walk(model, batch, length if adapt else 0), np.zeros(length, np.uint8)
  for part in parts:
    if part.words is None:
      text[part.start : part.stop] = np.frombuffer(part.stored, np.uint8)
      walk.forget()
      if on_bytes:
        on_bytes(part.stop - part.start)
      continue
    decoder = constriction().stream.queue.RangeDecoder(part.words.astype(np.uint32))

    def get(_: np.ndarray, p_BV: np.ndarray, decoder: Any = decoder) -> np.ndarray:
      try:
        return decoder.decode(family, p_BV).astype(np.uint8)
      except AssertionError as error:  # how the library tells of words that no text leads to
        raise DataError("the code does not fit the model's probabilities") from error

    walk(text, part.rounds, get, on_bytes)
  return text


def split(code: bytes, length: int, config: ModelConfig, batch: int) -> list[Part]:
  """Returns the blocks of the code of a text of `length` bytes.

  Raises:
    DataError: they are not there, or something else is.
  """
  parts: list[Part] = []
  # Before anything of the claimed size is made: a block has at least four bytes of code, and at most so many of text.
  fits = length <= len(code) // 4 * (_BLOCK + batch * config.context) and batch == batch_size(length, config, batch)
  at = 0
  for start, stop, rounds in _blocks(length, config, batch) if fits else ():
    count = int.from_bytes(code[at : at + 4], "little")
    size = stop - start if count == _STORED else 4 * count
    body, at = code[at + 4 : at + 4 + size], at + 4 + size
    if at > len(code):
      break
    words = None if count == _STORED else np.frombuffer(body, "<u4")
    parts.append(Part(start, stop, rounds, words, body if words is None else b""))
  if not fits or at != len(code):
    raise DataError(f"the code of {len(code):,} bytes is not that of a text of {length:,} bytes")
  return parts


def constriction() -> ModuleType:
  """Imports the library of the range coder. Raises ConfigError where it is not installed."""
  try:
    return importlib.import_module("constriction")
  except ImportError as error:
    raise ConfigError("the range coder is missing; install it with: pip install constriction") from error


def _family() -> Any:
  return constriction().stream.model.Categorical(perfect=False)  # cost in bits: below one in ten thousand


def batch_size(length: int, config: ModelConfig, at_most: int) -> int:
  """Returns the number of windows of a text of `length` bytes to code side by side."""
  if config.num_latents or config.recurrent:
    return 1  # each window begins with the end of the one before, or goes on from it
  count = -(-length // config.context)
  return max(1, -(-count // max(1, -(-count // at_most))))  # all rounds but the last are full, that one nearly


class _Walk:
  """Walks through windows, a round of them after the other, with one model; adapts to a text of `length` bytes if any.

  Vocabularies larger than bytes are not adapted to.
  """

  def __init__(self, model: Model, batch: int, length: int = 0):
    self._graph, parameters = nnx.split(model)
    self._model, self._batch, self._step = model, batch, _step()
    self._parameters = in_compute_dtype(model.config, parameters, batch)
    self._length = length if model.config.vocab_size <= VOCABULARY else 0
    self.forget()

  def forget(self) -> None:
    """Makes adaptation and a recurrent model begin anew: they do not know the bytes that come next."""
    self._after: tuple[Any, np.ndarray] | None = None  # of a recurrent model: its state, and the bytes before
    self._adaptation = Adaptation(self._model.config.vocab_size, self._length) if self._length else None

  def __call__(
    self, text: np.ndarray, rounds: list[list[Window]], code: Code, on_bytes: Callable[[int], None] | None
  ) -> None:
    """Calls `code` for the next byte of each window and puts what that returns into the text."""
    graph, parameters, batch = self._graph, self._parameters, self._batch
    adaptation = self._adaptation
    for rows in rounds:
      if self._after is None:
        if adaptation:
          adaptation.start(len(rows))
        (state, first), previous_B = _start(graph, parameters, text, rows, batch), np.zeros(batch, np.int32)
        if first:
          previous_B[0] = text[rows[0].start + first - 1]
      else:
        (state, previous_B), first = self._after, 0
      for t in range(first, rows[0].length):
        state, p_BV = self._step(graph, self._model.first_level_at(t), parameters, state, previous_B)
        at = [row.start + t for row in rows if t < row.length]  # only the last window of a text is short
        p_BV = np.asarray(p_BV)[: len(at)]
        check_finite(p_BV)
        if adaptation:
          p_BV = adaptation.mix(p_BV)
        previous_B = np.zeros(batch, np.int32)
        text[at] = previous_B[: len(at)] = coded = code(text[at], p_BV)
        if adaptation:
          adaptation.learn(coded)
        if on_bytes:
          on_bytes(len(at))
      self._after = (state, previous_B) if self._model.config.recurrent else None


def _blocks(length: int, config: ModelConfig, batch: int) -> Iterator[tuple[int, int, list[list[Window]]]]:
  """(first byte, the byte after the last, rounds of windows) of each block of a text."""
  rows = windows.windows_of(length, config, "basic")
  start, rounds = 0, []
  while batch_of_rows := list(itertools.islice(rows, batch)):
    rounds.append(batch_of_rows)
    stop = batch_of_rows[-1].start + batch_of_rows[-1].length
    if stop - start >= _BLOCK or stop == length:
      yield start, stop, rounds
      start, rounds = stop, []


def _start(
  graph: nnx.GraphDef, parameters: nnx.State, text: np.ndarray, rows: list[Window], batch: int
) -> tuple[Any, int]:
  """The state before the first byte that the windows score, and that byte's place in them."""
  config = nnx.merge(graph, parameters).config
  if not config.num_latents:
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
