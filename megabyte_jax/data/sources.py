"""Random-access sources of bytes: documents that are read anywhere without reading what lies before.

A source is named by a string. Several are separated by commas; each is one of
  PATH          a file, a folder (all files below it, in sorted order) or a glob, local or gs://
  sample:NAME   a folder of the real data shipped with this package, such as sample:text/train
  tfds:NAME:SPLIT  a TFDS data set, such as tfds:downsampled_imagenet/64x64:validation
One file, image or recording is one document.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from megabyte_jax import remote
from megabyte_jax.config import ConfigError, DataConfig
from megabyte_jax.config_parsing import require

SAMPLE_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample")
SKIP_HINT = "--config.data.skip_bad=True (eval.py and prepare: --skip-bad)"


class DataError(ValueError):
  """Data that cannot be read as they are; the message names the item and says what to do."""


class Source(Protocol):
  """Documents with random access. All methods may be called from several threads at once.

  Attributes:
    lengths: int64 array, bytes per document.
    joinable: whether a window may run from one document into the next (an image's bytes mean nothing
      without its first pixel's place, so images may not be joined).
    unit: bytes that belong together, such as the two of a 16-bit sample; windows start at multiples of it.
    slow: whether reading takes work or waiting (decoding, a network), so that threads help.
    skipped: items that were left out because they could not be read (see DataConfig.skip_bad).
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
    """A short string; differs when the data, or how they are turned into bytes, differ (`pair_fingerprints`)."""
    ...

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Bytes [start, stop) of a document, uint8, 0 <= start <= stop <= lengths[document]."""
    ...


def open_source(data: DataConfig, split: str) -> Source:
  """The source of a split ("train", "validation", "test") as the configuration names it.

  Where `data.train_weights` are given, the training source is a `Mixture`.

  Raises:
    ConfigError: the split has no source, or weights do not fit it.
    DataError: nothing is there, or it cannot be read.
  """
  spec = data.source(split)
  if split != "train" or not data.train_weights:
    return open_path(spec, data)
  specs = _split_list(spec)
  require(
    len(specs) == len(data.train_weights) and min(data.train_weights) > 0,
    f"config.data.train_weights {data.train_weights} must be {len(specs)} positive numbers, one for each of {spec!r}",
  )
  return Mixture([_open_one(one, data) for one in specs], data.train_weights)


def open_path(spec: str, data: DataConfig, skip_empty: bool = False) -> Source:
  """The source that `spec` names (see the head of this file), its items turned into bytes as `data` says.

  Args:
    skip_empty: leave out and count the empty files of a folder or glob (not one that is named itself) instead of
      raising DataError, for evaluation, where they cost nothing.

  Raises:
    ConfigError: the name cannot be understood.
    DataError: nothing is there, or it cannot be read.
  """
  sources = [_open_one(one, data, skip_empty) for one in _split_list(spec)]
  return sources[0] if len(sources) == 1 else Joined(sources)


def _split_list(spec: str) -> list[str]:
  specs = [one.strip() for one in spec.split(",")]
  require(all(specs), f"data source {spec!r} has an empty entry; separate names by single commas")
  return specs


def _open_one(spec: str, data: DataConfig, skip_empty: bool = False) -> Source:
  from megabyte_jax.data import files  # noqa: PLC0415  (the kinds of sources know this file)

  if scheme := remote.unknown_scheme(spec):
    raise DataError(f"{spec}: no data can be read from {scheme}; copy them to a disk or a bucket (gs://)")
  if spec.startswith("sample:"):
    path = os.path.join(SAMPLE_FOLDER, *spec.removeprefix("sample:").split("/"))
    if not os.path.exists(path):
      known = sorted(os.path.relpath(root, SAMPLE_FOLDER) for root, dirs, _ in os.walk(SAMPLE_FOLDER) if not dirs)
      raise ConfigError(f"no sample data {spec!r}; there are {', '.join('sample:' + name for name in known)}")
    return files.open_files(path, data, skip_empty)
  if spec.startswith("tfds:"):
    from megabyte_jax.data import tfds_source  # noqa: PLC0415

    return tfds_source.open_tfds(spec, data)
  return files.open_files(spec, data, skip_empty)


def said(error: Exception) -> str:
  """What a decoder says, without the in-memory file that it was given."""
  return re.sub(r" ?<_io\.BytesIO object at \w+>", "", str(error))


class Joined:
  """Several sources as one: the documents of the first, then those of the second, and so on."""

  def __init__(self, sources: Sequence[Source]):
    self.sources = list(sources)
    self.names = [name for source in sources for name in source.names]
    self.lengths = np.concatenate([source.lengths for source in sources])
    self.slow = any(source.slow for source in sources)
    self.skipped = sum(source.skipped for source in sources)
    self.joinable = all(source.joinable for source in sources)
    self.unit = math.lcm(*(source.unit for source in sources))
    self.fingerprint = combine_fingerprints(source.fingerprint for source in sources)
    self._first = np.cumsum([0] + [len(source.lengths) for source in sources])

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """See `Source.read`."""
    k = int(np.searchsorted(self._first, document, side="right")) - 1
    return self.sources[k].read(document - int(self._first[k]), start, stop)


class Mixture(Joined):
  """Several sources of which training windows are drawn in fixed proportions, each reshuffled at its own pace."""

  def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
    super().__init__(sources)
    self.weights = tuple(weights)
    self.fingerprint = combine_fingerprints([self.fingerprint, repr(self.weights)])


def pair_fingerprints(older: str, newer: str) -> str:
  """A fingerprint with two parts: what runs of older versions stored, and what they did not look at.

  A saved one without a second part is still compared with the first; see `same_fingerprint`.
  """
  return f"{older}|{newer}"


def same_fingerprint(saved: object, now: object) -> bool:
  """Whether a saved fingerprint is that of the data as they are now."""
  if isinstance(saved, str) and isinstance(now, str) and "|" not in saved:
    now = now.partition("|")[0]
  return saved == now


def combine_fingerprints(parts: Iterable[object]) -> str:
  """One fingerprint of several, or of other strings, in their order."""
  halves = [str(part).partition("|")[::2] for part in parts]
  older, newer = ("\0".join(half) for half in zip(*halves, strict=True))
  newer = _short_hash(newer) if newer.strip("\0") else ""
  return pair_fingerprints(_short_hash(older), newer) if newer else _short_hash(older)


def _short_hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_range(source: Source, document: int, start: int, stop: int) -> None:
  """Raises IndexError unless [start, stop) lies within the document."""
  length = int(source.lengths[document])
  if not 0 <= start <= stop <= length:
    raise IndexError(f"bytes {start} to {stop} of {source.names[document]}, which has {length}")
