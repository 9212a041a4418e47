"""Turns recordings into bytes and back: 16-bit little-endian samples or 8-bit mu-law, one channel.

soundfile and soxr are needed only here: pip install -e ".[audio]".
"""

from __future__ import annotations

import functools
import importlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import fingerprint_files, open_file, read_whole, sizes_of, why_unreadable
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.media import flac_files
from megabyte_jax.data.media.encoded_media import EncodedMedia
from megabyte_jax.data.media.sound_files import JOINED, chunk_problem, is_joined_mp3, ogg_problem
from megabyte_jax.data.shared_cache import DOCUMENT_BYTES, SharedCache, array_bytes
from megabyte_jax.data.sources import SKIP_HINT, check_range, said
from megabyte_jax.errors import DataError, require
from megabyte_jax.files.atomic_file import replacing

SUFFIXES = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf")
_MU = 255.0
_MOST_LONGER = 64  # times as many samples after resampling: a head that says 1 Hz would fill the memory
_KINDS = "WAV, FLAC, OGG, Opus, MP3, AIFF, AU or CAF"
_REMEDY = (
  f"write it anew, remove it before a run begins, or skip and count all such files with {SKIP_HINT}, also in a run "
  "that has begun"
)
_AT_ONCE = 1 << 20  # samples decoded at once: a head may promise more than there are


def sample_width(encoding: str) -> int:
  """Returns the bytes of a sample."""
  return 2 if encoding == "pcm16" else 1


def samples_to_bytes(samples: np.ndarray, encoding: str) -> np.ndarray:
  """Turns samples in [-1, 1) (float) or int16 into bytes, uint8.

  pcm16: two bytes a sample, the lower first. mulaw8: one byte a sample, round((sign(s) ln(1 + 255 |s|) / ln 256 + 1)
  * 255 / 2), so that neighbouring bytes are neighbouring amplitudes (the codes of G.711 are ordered otherwise).
  """
  if samples.dtype != np.int16 and encoding == "pcm16":
    samples = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
  if encoding == "pcm16":
    return samples.astype("<i2").view(np.uint8)
  x = samples / np.float32(32768.0) if samples.dtype == np.int16 else np.clip(samples, -1, 1)
  curve = np.sign(x) * np.log1p(_MU * np.abs(x)) / np.log1p(_MU)
  return np.floor((curve + 1) / 2 * 255 + 0.5).astype(np.uint8)


def bytes_to_samples(x: np.ndarray, encoding: str) -> np.ndarray:
  """Returns the int16 samples that bytes stand for; half a sample at the end is dropped. Exact for pcm16."""
  x = np.ascontiguousarray(x, np.uint8)
  if encoding == "pcm16":
    return x[: x.size // 2 * 2].view("<i2").astype(np.int16)
  curve = x / 255.0 * 2 - 1
  values = np.sign(curve) * (np.power(1 + _MU, np.abs(curve)) - 1) / _MU
  return np.clip(np.rint(values * 32767), -32768, 32767).astype(np.int16)


def write_wav(path: epath.PathLike, x: np.ndarray, encoding: str, sample_rate: int) -> None:
  """Writes bytes in `encoding` as a 16-bit WAV file, which appears whole or not at all.

  Raises:
    ConfigError: the sample rate is not positive.
    DataError: soundfile is not installed.
  """
  require(sample_rate > 0, "a WAV file needs a sample rate; set config.data.sample_rate")
  file = io.BytesIO()
  samples = bytes_to_samples(x, encoding)
  _import("soundfile").write(file, samples, sample_rate, format="WAV", subtype="PCM_16")
  with replacing(path) as temporary:
    temporary.write_bytes(file.getvalue())


class Recording(NamedTuple):
  """The length and rate in the head of a file: samples a channel, samples per second."""

  frames: int
  rate: int

  def resampled(self, rate: int) -> int:
    """Returns the samples after resampling to `rate` (0: none), rounded half up."""
    return (2 * self.frames * rate + self.rate) // (2 * self.rate) if rate else self.frames


class AudioFiles:
  """One document per recording: its channels averaged, resampled by soxr ("HQ"), encoded as `data` says.

  Every read needs the whole decoded recording, of which a gigabyte is kept: pack more than that (`prepare pack`).

  Args:
    paths, names: where the files are and what they are called.
    records: holds the encoded recordings where they are not files of their own; `paths` is then for errors alone.
    data: sample_rate, encoding and skip_bad; with the latter every file is decoded once at the start, and unreadable
      ones are left out and counted in `skipped`, beside those that `records` has left out.

  Raises:
    DataError: a file is empty or no such audio; or, when it is read, damaged.
  """

  joinable, slow = True, True

  def __init__(self, paths: Sequence[str], names: Sequence[str], data: DataConfig, records: EncodedMedia | None = None):
    self._records = records
    self.data, self.paths, self.names, self._all = data, list(paths), list(names), (paths, names)
    rate, self.unit = data.sample_rate, sample_width(data.encoding)
    _import("soundfile"), _import("soxr")
    with ThreadPoolExecutor() as pool:
      heads = list(pool.map(self._head, range(len(paths))))
    kept = [i for i, head in enumerate(heads) if head is not None]
    if not kept:
      raise DataError(f"none of {len(paths)} recordings can be read, {names[0]} for one")
    self.skipped_names = [names[i] for i, head in enumerate(heads) if head is None]
    self.skipped = len(paths) - len(kept) + (records.skipped if records else 0)
    self._kept = kept
    self.paths, self.names = [self.paths[i] for i in kept], [self.names[i] for i in kept]
    self.lengths = np.array([head.resampled(rate) * self.unit for head in heads if head is not None], np.int64)
    self._bytes = SharedCache(self._encode, DOCUMENT_BYTES, array_bytes)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the files and with how they are turned into bytes."""
    records = self._records
    files = records.fingerprint if records else fingerprint_files(*self._all, sizes_of(self._all[0]))
    return combine_fingerprints([files, str(self.data.sample_rate), self.data.encoding])

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Reads bytes; see `Source`. Raises DataError naming a file that is damaged."""
    check_range(self, document, start, stop)
    return self._bytes(document)[start:stop].copy()

  def _head(self, i: int) -> Recording | None:
    """None for an unreadable file that is to be skipped."""
    try:
      data = self._records.load(i) if self._records else None
      head = read_head(self.paths[i], data)
      self._check_rate(head, self.paths[i])
      if self.data.skip_bad:
        decode(self.paths[i], data)
      return head
    except DataError:
      if self.data.skip_bad:
        return None
      raise

  def _check_rate(self, head: Recording, path: str) -> None:
    """Raises DataError where resampling would leave nothing, or make a file of a wrong head fill the memory."""
    count = head.resampled(self.data.sample_rate)
    if count == 0 or count > _MOST_LONGER * head.frames + 1:
      raise DataError(
        f"{path} says that it has {head.rate:,} samples per second; {head.frames:,} of these would become {count:,} at "
        f"config.data.sample_rate={self.data.sample_rate}; write it anew, or skip such files with {SKIP_HINT}"
      )

  def _encode(self, document: int) -> np.ndarray:
    data = self._records.load(self._kept[document]) if self._records else None
    samples, rate = decode(self.paths[document], data)
    wanted = self.data.sample_rate or rate
    if wanted != rate:
      count = Recording(len(samples), rate).resampled(wanted)
      if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
      samples = _import("soxr").resample(samples, rate, wanted, quality="HQ")[:count]
      samples = np.pad(samples, (0, count - len(samples)))
    x = samples_to_bytes(samples, self.data.encoding)
    if x.size != self.lengths[document]:
      raise DataError(f"{self.paths[document]} is no longer as long as when it was opened; start again")
    return x


def read_head(path: str, data: bytes | None = None) -> Recording:
  """Returns the length and rate of the recording in a file, or in `data`, which `path` then only names.

  Raises:
    DataError: names the file where it is empty, cut short or no audio.
  """
  soundfile = _import("soundfile")
  try:
    with _opened(path, data) as file:
      if problem := chunk_problem(file):
        raise _bad(path, problem)
      file.seek(0)
      if flac_files.says_no_length(file.read(26)):
        file.seek(0)
        file = io.BytesIO(flac_files.with_length(file.read()))
      file.seek(0)
      info = soundfile.info(file)
  except DataError:
    raise
  except FileNotFoundError as error:
    raise _bad(path, why_unreadable(path, error)) from error
  except Exception as error:  # soundfile's own errors, OSError, and whatever the parsing of damaged heads raises
    raise _bad(path, f"is not a readable {_KINDS} file ({said(error)})") from error
  if not 0 < info.frames < 1 << 40 or not 0 < info.samplerate < 1 << 24:
    raise _bad(path, f"has {info.frames} samples at {info.samplerate} Hz by its head")
  return Recording(info.frames, info.samplerate)


def _bad(path: str, problem: str) -> DataError:
  return DataError(f"{path} {problem}; {_REMEDY}")


def _opened(path: str, data: bytes | None) -> IO[bytes]:
  return open_file(path) if data is None else io.BytesIO(data)


def decode(path: str, data: bytes | None = None) -> tuple[np.ndarray, int]:
  """Decodes a recording.

  Returns:
    (samples, samples per second): int16 [n] for 16-bit files of one channel, else float32 [n], channels averaged.

  Raises:
    DataError: names a file that is damaged or cut short.
  """
  soundfile, head = _import("soundfile"), read_head(path, data)
  data = read_whole(path) if data is None else data
  if data.startswith(b"OggS") and (problem := ogg_problem(data)):
    raise _bad(path, problem)
  try:
    data = flac_files.with_length(data) if flac_files.says_no_length(data[:26]) else data
    with soundfile.SoundFile(io.BytesIO(data)) as file:
      kind, subtype, channels = file.format, file.subtype, file.channels
      exact = "int16" if subtype == "PCM_16" else "int32" if subtype == "PCM_24" else "float32"
      samples = _read_all(file, exact, head.frames)
  except Exception as error:  # see read_head
    raise _bad(path, f"cannot be decoded ({said(error)})") from error
  if (kind == "FLAC" and flac_files.is_joined(data)) or (kind == "MP3" and is_joined_mp3(data)):
    raise _bad(path, JOINED)
  if len(samples) != head.frames:
    raise _bad(path, f"is damaged or cut short: {len(samples):,} of {head.frames:,} samples can be decoded")
  if kind == "FLAC" and (width := flac_files.WIDTHS.get(subtype)) and not flac_files.has_checksum(data, samples, width):
    raise _bad(path, "is damaged: its samples do not have the checksum in its head")
  if exact == "float32" and not np.isfinite(samples).all():
    raise _bad(path, "has samples that are not numbers")
  if exact == "int16" and channels == 1:
    return samples[:, 0], head.rate
  scale = {"int16": 1 / 32768, "int32": 1 / 2147483648, "float32": 1.0}[exact]
  return (samples.astype(np.float32) * np.float32(scale)).mean(axis=1), head.rate


def _read_all(file: Any, dtype: str, frames: int) -> np.ndarray:
  """All samples of an open soundfile.SoundFile, [n, channels], n at most `frames`."""
  blocks, left = [], frames
  while left and len(block := file.read(min(left, _AT_ONCE), dtype=dtype, always_2d=True)):
    blocks.append(block)
    left -= len(block)
  return np.concatenate(blocks) if blocks else np.zeros((0, file.channels), dtype)


def _import(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise DataError(f'audio needs {name}; install it with: pip install -e ".[audio]"') from error
