"""Turns any bytes into pieces of a SentencePiece model and back, without loss.

SentencePiece itself is lossless for texts alone, and only without normalisation. So what it cannot hold, bytes that are
no UTF-8 and its own mark U+2581, becomes byte pieces here; and whatever it makes of the rest is compared with the text,
which becomes byte pieces, too, where it would not come back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from megabyte_jax.data.files import read_whole
from megabyte_jax.data.subwords.segments import as_bytes, runs, segments
from megabyte_jax.errors import ConfigError, DataError

_AT_ONCE = 1 << 12  # segments that SentencePiece gets together
_PROBES = (" two  spaces ", "\tﬁ①Å\u00a0é\u3000", "line\n\n break\r\n")  # a normalisation changes one of these


def sentencepiece() -> Any:
  """Returns the package. Raises DataError that says how to install it."""
  try:
    import sentencepiece  # noqa: PLC0415
  except ImportError as error:
    raise DataError('subwords need sentencepiece, which is not installed: pip install -e ".[subwords]"') from error
  return sentencepiece


class Tokenizer:
  """Holds a SentencePiece model with byte pieces; may be used from several threads at once.

  Attributes:
    size: pieces, which a model's `vocab_size` must be.
    pieces: the bytes that each stands for; none for control pieces, which no text becomes.
    lengths: int32 [size], how many bytes that are.
    sha256: of the file.
    dtype: the smallest unsigned integers that hold all pieces.
  """

  def __init__(self, file: bytes, path: str = "the tokenizer"):
    """Reads the contents of a SentencePiece model; `path` is its name in errors.

    Raises:
      DataError: sentencepiece is not installed, or this is not a model of it.
      ConfigError: the tokenizer is not lossless: it lacks byte pieces, or changes texts.
    """
    self.path, self.sha256 = path, hashlib.sha256(file).hexdigest()
    package = sentencepiece()
    try:
      self._model = package.SentencePieceProcessor(model_proto=file)
      self.size = self._model.vocab_size()
    except (RuntimeError, ValueError, OSError) as error:
      raise DataError(f"{path} is not a SentencePiece model; {_MAKE_ONE}") from error
    if not self.size:
      raise DataError(f"{path} is not a SentencePiece model; {_MAKE_ONE}")
    self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)
    self.pieces = [self._bytes_of(i) for i in range(self.size)]
    self.lengths = np.array([len(piece) for piece in self.pieces], np.int32)
    byte_pieces = {self.pieces[i]: i for i in range(self.size) if self._model.is_byte(i)}
    if len(byte_pieces) != 256:
      raise ConfigError(f"{path} lacks pieces for single bytes and would lose what it does not know; {_MAKE_ONE}")
    self._byte_ids = np.array([byte_pieces[bytes([value])] for value in range(256)], self.dtype)
    changed = [probe for probe in _PROBES if self.decode(self._model.encode(probe)) != probe.encode()]
    if changed:
      raise ConfigError(f"{path} changes texts, such as {changed[0]!r}, by its normalisation; {_MAKE_ONE}")

  def _bytes_of(self, i: int) -> bytes:
    name = self._model.id_to_piece(i)
    if self._model.is_byte(i):
      return bytes([int(name[3:5], 16)])
    if self._model.is_unknown(i) or self._model.is_control(i):
      return b""
    return name.replace("\u2581", " ").encode()

  def encode(self, text: bytes) -> np.ndarray:
    """Returns the pieces of a text of any bytes, [n] of `dtype`."""
    return np.concatenate([*self.encode_blocks([text]), np.zeros(0, self.dtype)])

  def encode_blocks(self, blocks: Iterable[bytes], num_threads: int = 1) -> Iterator[np.ndarray]:
    """Yields the pieces of a text that comes in parts of any size; the parts make no difference."""
    batch: list[bytes] = []
    for segment in segments(blocks):
      batch.append(segment)
      if len(batch) == _AT_ONCE:
        yield self._encode(batch, num_threads)
        batch = []
    if batch:
      yield self._encode(batch, num_threads)

  def _encode(self, batch: list[bytes], num_threads: int) -> np.ndarray:
    parts = [run for segment in batch for run in runs(segment)]
    encoded = iter(self._model.encode([text for text, known in parts if known], num_threads=num_threads))
    made: list[np.ndarray | list[int]] = []
    for text, known in parts:
      ids, wanted = next(encoded) if known else [], as_bytes(text)
      lossless = known and b"".join([self.pieces[i] for i in ids]) == wanted
      made.append(ids if lossless else self._byte_ids[np.frombuffer(wanted, np.uint8)])
    return np.concatenate([np.asarray(ids, self.dtype) for ids in made])

  def decode(self, tokens: Iterable[int] | np.ndarray) -> bytes:
    """Returns the bytes that pieces stand for; those of a text give the text."""
    return b"".join([self.pieces[int(i)] for i in tokens])


_MAKE_ONE = "make one with: python -m megabyte_jax prepare tokenizer SOURCE OUT.model"


def load_tokenizer(path: str, sha256: str = "") -> Tokenizer:
  """Reads a tokenizer from a local or remote file.

  Args:
    path: of a SentencePiece model.
    sha256: what the file's checksum must be; '' takes any.

  Raises:
    DataError: the file cannot be read, is not a model, or sentencepiece is not installed.
    ConfigError: the file has another checksum, or the tokenizer is not lossless.
  """
  file = read_whole(path)
  found = hashlib.sha256(file).hexdigest()
  if sha256 and found != sha256:
    raise ConfigError(
      f"the tokenizer {path} has changed: its SHA-256 sum is {found[:12]}..., that of the run {sha256[:12]}...; "
      "restore the file that the model was trained with"
    )
  return _tokenizer(file, path)


_KEPT: dict[str, Tokenizer] = {}  # the last one: a run opens several sources with it


def _tokenizer(file: bytes, path: str) -> Tokenizer:
  digest = hashlib.sha256(file).hexdigest()
  if digest not in _KEPT:
    made = Tokenizer(file, path)
    _KEPT.clear()
    _KEPT[digest] = made
  return _KEPT[digest]
