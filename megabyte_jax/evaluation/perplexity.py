"""Computes word-level perplexity as PG-19 defines it: exp(total nats / number of words).

The number of words is the data set's, whatever the model's units, so that models of bytes, subwords and words are
comparable (Rae et al., 2019; Table 3 of MEGABYTE). The nats must cover the same text as the words. A copy with other
line ends has other bytes, but its nats over the official number of words remain comparable.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from megabyte_jax.data.sources import Source
from megabyte_jax.data.subwords.source import text_of
from megabyte_jax.errors import ConfigError, require

_WHITESPACE = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))
_CHUNK = 2**24


class TextSize(NamedTuple):
  """Size of a split: raw bytes (None where unpublished) and words."""

  bytes: int | None
  words: int


# The release notes of PG-19 (https://github.com/google-deepmind/pg19).
PG19 = {
  "train": TextSize(None, 1_973_136_207),
  "validation": TextSize(None, 3_007_061),
  "test": TextSize(41_289_101, 6_966_499),
}


def word_perplexity(nats: float, words: int) -> float:
  """Returns exp(nats / words), inf on overflow; `nats` is the total of the text. Raises ConfigError if words is 0."""
  require(words > 0, f"words is {words}; word-level perplexity needs the number of words of the text scored")
  try:
    return math.exp(nats / words)
  except OverflowError:
    return math.inf


def count_words(text: bytes | np.ndarray) -> int:
  """Counts runs of bytes that are not ASCII white space; `text` may be a memory-mapped uint8 array of any size."""
  data = np.frombuffer(text, np.uint8) if isinstance(text, bytes | bytearray | memoryview) else text
  words, after_space = 0, True
  for start in range(0, len(data), _CHUNK):
    space = _WHITESPACE[data[start : start + _CHUNK]]
    before = np.concatenate([[after_space], space[:-1]])
    words += int(np.count_nonzero(before & ~space))
    after_space = bool(space[-1])
  return words


def number_of_words(words: str, split: str, source: Source) -> int:
  """Returns the number of words of a text: as given, counted, or that of the data set.

  Documents are counted one by one: the last word of one and the first of the next are two.

  Args:
    words: a number; `count`; `pg19`, PG-19's number for `split`; or `pg19-SPLIT`, that of another name of the text.
    split: of the run's data that is evaluated; '' for other data.
    source: the text.

  Raises:
    ConfigError: `words` is none of these, or the text has fewer bytes than words.
  """
  source = text_of(source)
  if words == "count":
    read = (source.read(i, 0, int(length)) for i, length in enumerate(source.lengths))
    return sum(count_words(text) for text in read)
  if words == "pg19" and not split:
    raise ConfigError("--words=pg19 with --data: which split is it? Take pg19-train, pg19-validation or pg19-test")
  if words in ("pg19", *(f"pg19-{name}" for name in PG19)):
    number = PG19[words.partition("-")[2] or split].words
  else:
    known = words.isdecimal() and len(words) < 20 and int(words) > 0
    require(known, f"--words={words} is neither a number nor count nor pg19 nor pg19-{{train,validation,test}}")
    number = int(words)
  length = int(source.lengths.sum())
  require(number <= length, f"--words={words}: {number:,} words cannot be those of {length:,} bytes")
  return number
