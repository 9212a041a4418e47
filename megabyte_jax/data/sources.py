"""Defines sources of bytes: documents that are read anywhere without reading what lies before; several as one."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.errors import DataError, require

SKIP_HINT = "--config.data.skip_bad=True (eval.py and prepare: --skip-bad)"
RAW_HINT = "--config.data.raw=True (eval.py and prepare: --raw)"


class Source(Protocol):
  """Documents with random access. All methods may be called from several threads at once.

  Attributes:
    lengths: int64 array, bytes per document.
    joinable: whether a window may run from one document into the next (an image's bytes mean nothing
      without its first pixel's place, so images may not be joined).
    unit: bytes that belong together, such as the two of a 16-bit sample; windows start at multiples of it.
    slow: whether reading takes work or waiting (decoding, a network), so that threads help.
    skipped: items that were left out because they could not be read (see DataConfig.skip_bad). Sources that know
      names of them have these, too; see `skipped_names`.
  """

  lengths: np.ndarray
  joinable: bool
  unit: int
  slow: bool
  skipped: int

  @property
  def names(self) -> Sequence[str]:
    """One name per document."""
    ...

  @property
  def fingerprint(self) -> str:
    """A short string; differs when the data, or how they are turned into bytes, differ."""
    ...

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Returns bytes [start, stop) of a document, uint8, 0 <= start <= stop <= lengths[document].

    Of subwords (subwords/source.py) all lengths and places count tokens, which are uint16 or uint32.
    """
    ...


class NothingInside(DataError):
  """No file of a source holds any data, as against damaged data or none in the field; others beside it may."""


def said(error: Exception) -> str:
  """Returns what a decoder says, without the file object that it was given."""
  return re.sub(r" ?<_io\.[^>]*>", "", str(error))


class Joined:
  """Several sources as one: the documents of the first, then those of the second, and so on.

  Args:
    sources: at least one.
    specs: what each is called by the user; empty where they are parts of what has one name.
  """

  def __init__(self, sources: Sequence[Source], specs: Sequence[str] = ()):
    self.sources, self.specs = list(sources), tuple(specs)
    self.names = _Chained([source.names for source in sources])
    self.lengths = np.concatenate([source.lengths for source in sources])
    self.slow = any(source.slow for source in sources)
    self.skipped = sum(source.skipped for source in sources)
    self.skipped_names = [name for source in sources for name in skipped_names(source)]
    self.joinable = all(source.joinable for source in sources)
    self.unit = math.lcm(*(source.unit for source in sources))
    self._first = np.cumsum([0] + [len(source.lengths) for source in sources])

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with those of the sources, and with their order."""
    return combine_fingerprints(source.fingerprint for source in self.sources)

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Reads bytes; see `Source`."""
    k = int(np.searchsorted(self._first, document, side="right")) - 1
    return self.sources[k].read(document - int(self._first[k]), start, stop)


class _Chained(Sequence[str]):
  """Several sequences of names one after the other, without copies: there may be millions."""

  def __init__(self, parts: Sequence[Sequence[str]]):
    self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, i):
    if isinstance(i, slice):
      return [self[j] for j in range(*i.indices(len(self)))]
    i = int(i) + (len(self) if i < 0 else 0)
    if not 0 <= i < len(self):
      raise IndexError(i)
    part = int(np.searchsorted(self._ends, i, side="right"))
    return self._parts[part][i - (int(self._ends[part - 1]) if part else 0)]


class Mixture(Joined):
  """Several sources of which training windows are drawn in fixed proportions, each reshuffled at its own pace."""

  def __init__(self, sources: Sequence[Source], weights: Sequence[float], specs: Sequence[str] = ()):
    super().__init__(sources, specs)
    self.weights = tuple(weights)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with those of the sources, with their order, and with the weights."""
    joined = combine_fingerprints(source.fingerprint for source in self.sources)
    return combine_fingerprints([joined, repr(self.weights)])


def check_range(source: Source, document: int, start: int, stop: int) -> None:
  """Raises IndexError unless [start, stop) lies within the document."""
  length = int(source.lengths[document])
  if not 0 <= start <= stop <= length:
    raise IndexError(f"bytes {start} to {stop} of {source.names[document]}, which has {length}")


def check_unit(source: Source, context: int) -> None:
  """Raises ConfigError unless windows of `context` bytes, one after the other, hold whole samples."""
  require(
    context % source.unit == 0,
    f"a context of {context} bytes cuts apart the {source.unit} bytes of a sample; make it a multiple",
  )


def evenly_spaced(count: int, most: int) -> list[int]:
  """Returns which of `count` items are looked at where `most` are enough: from the first to the last, increasing."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def documents_in_words(count: int) -> str:
  """Returns `1 document`, `2 documents` and so on."""
  return f"{count:,} document{'s' * (count != 1)}"


def skipped_names(source: Source) -> list[str]:
  """Returns what the items that were left out are called, of those that the source knows; `skipped` counts all."""
  return getattr(source, "skipped_names", [])


def first_names(names: Sequence[str], count: int) -> str:
  """Returns up to three of the names of `count` items, and how many more there are."""
  shown = names[:3]
  more = f" and {count - len(shown):,} more" if count > len(shown) else ""
  return ", ".join(shown) + more


def nothing_in(paths: Sequence[str], what: str) -> NothingInside:
  """Returns the error about files, all of a source, that hold no records, rows or the like."""
  has, it = ("has", "it") if len(paths) == 1 else ("have", "them")
  named = first_names(paths, len(paths))
  return NothingInside(f"{named} {has} no {what}; remove {it}, or skip such files with {SKIP_HINT}")


def subject(source: Source) -> str:
  """Returns the beginning of a sentence about a source: "NAME has", "NAME ... NAME (N documents) have"."""
  names = source.names
  return f"{names[0]} has" if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names):,} documents) have"
