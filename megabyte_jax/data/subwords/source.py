"""Reads documents as subwords: tokenized once, into the cache folder, and read there at any place.

An entry of the cache belongs to a text, by its fingerprint and the times when its files were changed, and to a
tokenizer, by its checksum. It is a file of all tokens, two or four bytes each, and an index of where documents end. It
replaces that of the same files as they were before.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import ByteFiles
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.read_ahead import THREADS
from megabyte_jax.data.records import cache
from megabyte_jax.data.sources import Joined, Source, check_range, skipped_names
from megabyte_jax.data.subwords.tokenizer import Tokenizer, load_tokenizer, sentencepiece
from megabyte_jax.display.progress import Progress
from megabyte_jax.errors import DataError, require
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.outputs import NO_ROOM

_BLOCK = 1 << 20  # bytes of a text read at once
_SHOWN = 1 << 24  # bytes of a text from which on the work is shown


class Subwords:
  """The source of a text's tokens: `lengths` and places count tokens, which `read` returns as unsigned integers.

  Args:
    text: where the bytes are.
    tokenizer: cuts each document by itself.
    cache_dir: see `DataConfig`.

  Raises:
    DataError: the tokens cannot be kept in the cache folder, or the text cannot be read.

  Attributes:
    text: the source of the bytes.
    tokenizer: as given.
  """

  joinable, unit, slow = True, 1, False

  def __init__(self, text: Source, tokenizer: Tokenizer, cache_dir: str = ""):
    self.text, self.tokenizer = text, tokenizer
    self.skipped, self.skipped_names = text.skipped, skipped_names(text)
    require(text.joinable and text.unit == 1, "subwords are for texts; set config.data.form to what these data are")
    path, ends = _tokens_of(text, tokenizer, cache_dir)
    self.lengths = np.diff(ends, prepend=0)
    self._starts = ends - self.lengths
    self._file = ByteFiles([path], [path]) if len(ends) and ends[-1] else None

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the text and the tokenizer."""
    return combine_fingerprints([self.text.fingerprint, self.tokenizer.sha256])

  @property
  def names(self) -> Sequence[str]:
    """Those of the text."""
    return self.text.names

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Returns tokens [start, stop) of a document. Raises DataError where the cache was deleted meanwhile."""
    check_range(self, document, start, stop)
    first, width = int(self._starts[document]), self.tokenizer.dtype.itemsize
    if self._file is None or start == stop:
      return np.zeros(0, self.tokenizer.dtype)
    return self._file.read(0, (first + start) * width, (first + stop) * width).view(self.tokenizer.dtype)


def open_subwords(text: Source, data: DataConfig) -> Subwords:
  """Returns the tokens of a text by the tokenizer that `data` names.

  Raises:
    ConfigError: the tokenizer has another checksum than `data.tokenizer_sha256`, or is not lossless.
    DataError: it cannot be read, or the tokens cannot be kept.
  """
  return Subwords(text, load_tokenizer(data.tokenizer, data.tokenizer_sha256), data.cache_dir)


def with_checksum(data: DataConfig) -> DataConfig:
  """Returns the settings of data with the checksum of their tokenizer written down, if they have one.

  Raises:
    ConfigError: another one is written down already.
    DataError: the tokenizer cannot be read.
  """
  if data.form != "subwords":
    return data
  return dataclasses.replace(data, tokenizer_sha256=load_tokenizer(data.tokenizer, data.tokenizer_sha256).sha256)


def check_vocabulary(source: Source, vocab_size: int) -> None:
  """Raises ConfigError unless a model of so many values fits the tokenizer of a source of tokens."""
  table = token_lengths(source)
  require(
    table is None or len(table) == vocab_size,
    f"the tokenizer has {0 if table is None else len(table):,} pieces, but model.vocab_size is {vocab_size:,}; set "
    f"--config.model.vocab_size={0 if table is None else len(table)}",
  )


def text_of(source: Source) -> Source:
  """Returns the source of the bytes that a source of tokens was made of; any other source as it is."""
  if isinstance(source, Subwords):
    return source.text
  if isinstance(source, Joined):  # a mixture's texts, too, are joined here: nothing is drawn of them
    texts = [text_of(part) for part in source.sources]
    if any(text is not part for text, part in zip(texts, source.sources, strict=True)):
      return Joined(texts, source.specs)
  return source


def token_lengths(source: Source) -> np.ndarray | None:
  """Returns how many bytes each token stands for, int32 [pieces]; None where a token is a byte."""
  if isinstance(source, Joined):
    return token_lengths(source.sources[0])
  return source.tokenizer.lengths if isinstance(source, Subwords) else None


def tokens_within(source: Source, max_bytes: int) -> np.ndarray:
  """Returns how many tokens of each document lie within the first `max_bytes` bytes of all, int64 [documents].

  The last of them may reach beyond; 0 takes all. Where a token is a byte, these are bytes.
  """
  lengths = np.asarray(source.lengths, np.int64)
  if not max_bytes:
    return lengths
  sizes = np.asarray(text_of(source).lengths, np.int64)
  left = np.clip(max_bytes - (np.cumsum(sizes) - sizes), 0, sizes)  # bytes of each document
  taken = np.where(left == sizes, lengths, 0)
  table = token_lengths(source)
  for document in np.flatnonzero((left > 0) & (left < sizes)).tolist():  # one, at most
    if table is None:
      taken[document] = left[document]
      continue
    done, bytes_done, step = 0, 0, 1 << 16
    while bytes_done < left[document]:
      tokens = source.read(document, done, min(done + step, int(lengths[document])))
      ends = bytes_done + np.cumsum(table[tokens])
      count = int(np.searchsorted(ends, left[document])) + 1
      done, bytes_done = done + min(count, len(tokens)), int(ends[-1])
    taken[document] = done
  return taken


def _tokens_of(text: Source, tokenizer: Tokenizer, cache_dir: str) -> tuple[str, np.ndarray]:
  """The file of all tokens, which is made if need be, and where each document ends in it, int64 [documents]."""
  parts = list(_parts(text))
  belongs_to = {
    "kind": "tokens",
    "text": text.fingerprint,
    "changed": combine_fingerprints(changed for _, changed in parts),
    "tokenizer": tokenizer.sha256,
    "sentencepiece": sentencepiece().__version__,
  }
  folder = os.path.join(cache.cache_folder(cache_dir), "tokens")
  name = cache.entry_name("tokens", tokenizer.sha256, belongs_to["sentencepiece"], *(part for part, _ in parts))
  path = os.path.join(folder, f"{name}-{cache.entry_name(*sorted(belongs_to.items()))[:8]}")
  try:
    with cache.held(folder, name):
      ends = _kept(path, belongs_to, tokenizer)
      if ends is None:
        cache.remove_versions(folder, name)
        ends = _tokenize(text, tokenizer, path)
        cache.save_index(f"{path}.index", belongs_to, {"ends": ends}, {})
  except OSError as error:
    what = "there is no room for the tokens" if error.errno in NO_ROOM else "the tokens cannot be kept"
    raise DataError(f"{what} in {folder} ({error.strerror or error}); set config.data.cache_dir") from error
  return path, ends


def _kept(path: str, belongs_to: dict[str, Any], tokenizer: Tokenizer) -> np.ndarray | None:
  found = cache.load_index(f"{path}.index", belongs_to)
  if found is None:
    return None
  ends = found[0]["ends"].astype(np.int64)
  size = int(ends[-1]) * tokenizer.dtype.itemsize if len(ends) else 0
  try:
    return ends if os.stat(path).st_size == size else None
  except OSError:
    return None


def _tokenize(text: Source, tokenizer: Tokenizer, path: str) -> np.ndarray:
  """Writes the tokens of all documents to `path` and returns where each ends."""
  total, ends, count = int(np.sum(text.lengths)), [], 0
  with (
    replacing(path) as temporary,
    open(temporary, "wb") as file,
    Progress("tokenizing", total, enabled=total > _SHOWN) as progress,
  ):
    for document, length in enumerate(text.lengths):
      for tokens in tokenizer.encode_blocks(_blocks(text, document, int(length), progress), THREADS):
        file.write(tokens.data)
        count += len(tokens)
      ends.append(count)
    file.flush()
    os.fsync(file.fileno())
  return np.array(ends, np.int64)


def _blocks(text: Source, document: int, length: int, progress: Progress) -> Iterator[bytes]:
  for start in range(0, length, _BLOCK):
    stop = min(start + _BLOCK, length)
    yield text.read(document, start, stop).tobytes()
    progress.add(stop - start)


def _parts(text: Source) -> Iterator[tuple[str, int]]:
  """What stays the same of the parts of a text when it changes, and when each was last changed.

  Of files that is where they are and what they are called; of other sources it is all that they hold, and no time.
  """
  if isinstance(text, Joined):
    for part in text.sources:
      yield from _parts(part)
  elif isinstance(text, ByteFiles):
    for path, name in zip(text.paths, text.names, strict=True):
      identity = cache.identity(path)
      yield f"{identity['path']}\0{name}", int(identity["modified"])
  else:
    yield text.fingerprint, 0
