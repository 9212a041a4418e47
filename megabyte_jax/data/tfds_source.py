"""Reads TFDS data sets at random from ArrayRecord files without TensorFlow.

A data set is named `tfds:NAME:SPLIT` or `tfds:NAME:SPLIT#FEATURE`. NAME is a TFDS name, with configuration and version
if need be (downsampled_imagenet/64x64, imagenet2012:5.1.0), or the folder of a prepared data set, local or gs://; SPLIT
is TFDS's split syntax (validation, train[:90%]).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
import re
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from megabyte_jax.config import DataConfig
from megabyte_jax.data.file_handles import Handles, require_descriptor
from megabyte_jax.data.files import fingerprint_files, sizes_of
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.media.image_source import Images
from megabyte_jax.data.records.contents import pack_command
from megabyte_jax.data.records.store import Numbered
from megabyte_jax.data.shared_cache import SharedCache
from megabyte_jax.data.sources import SKIP_HINT, Source, check_range
from megabyte_jax.errors import ConfigError, DataError, require
from megabyte_jax.files import object_stores

_SPLIT = r"\w+(?:\[[^\]]*\])?"
_SPEC = re.compile(rf"tfds:(?P<name>.+):(?P<split>{_SPLIT}(?:\+{_SPLIT})*)(?:#(?P<feature>\w+))?")
_RECORDS_KEPT = 16  # texts kept at hand: an evaluation reads the windows of a book one after the other


class Spec(NamedTuple):
  """The parts of `tfds:NAME:SPLIT#FEATURE`; feature may be empty."""

  name: str
  split: str
  feature: str


def parse_spec(spec: str) -> Spec:
  """Takes a name apart. Raises ConfigError where `spec` is no `tfds:NAME:SPLIT`."""
  match = _SPEC.fullmatch(spec)
  if match is None:
    raise ConfigError(f"data source {spec!r} names no split; write it like tfds:pg19:validation")
  return Spec(match["name"], match["split"], match["feature"] or "")


def open_tfds(spec: str, data: DataConfig) -> Source:
  """Opens the images (data.form = image) or texts (bytes) of a data set.

  Grey and CMYK JPEGs become RGB, as the data set's own description (three channels) has it.

  Raises:
    ConfigError: no such feature, or `spec` names no split.
    DataError: no such data set or split, or it is not prepared, or not as ArrayRecord; the message holds the command
      that helps.
  """
  import tensorflow_datasets as tfds  # noqa: PLC0415

  name, split, feature = parse_spec(spec)
  require(data.form != "audio", f"{spec}: audio is read from files; no TFDS audio yet (config.data.form)")
  builder = find_builder(name, data.tfds_dir)
  _check_prepared(builder, name, data.tfds_dir)
  kinds = (tfds.features.Image,) if data.form == "image" else (tfds.features.Text, tfds.features.Tensor)
  feature = _find_feature(builder, kinds, feature, spec, data.form)
  records = Records(builder, split, feature, spec)
  return Images(records, data, convert="colours") if data.form == "image" else Texts(records, data)


def find_builder(name: str, tfds_dir: str) -> Any:
  """Returns TFDS's builder of a data set, or of that in the folder `name`. Raises DataError if there is none."""
  import tensorflow_datasets as tfds  # noqa: PLC0415

  if object_stores.is_remote(name) or name.startswith((".", "/", "~")):
    folder = epath.Path(name).expanduser()
    if not (folder / "dataset_info.json").exists():
      raise DataError(f"{name} holds no prepared TFDS data set (no dataset_info.json)")
    return tfds.builder_from_directory(folder)
  where = tfds_dir or "TFDS's default folder"
  try:
    # What lies there describes itself best: the builder of the code does not see that a data set has two file formats,
    # and some cannot be imported without TensorFlow.
    return tfds.core.read_only_builder.builder_from_files(name, data_dir=tfds_dir or None)
  except tfds.core.DatasetNotFoundError:
    pass
  except (ValueError, AssertionError) as error:
    raise DataError(f"tfds:{name}: {error}") from error
  try:
    builder = tfds.builder(name, data_dir=tfds_dir or None)
    return tfds.builder_from_directory(builder.data_dir) if builder.info.splits else builder
  except ImportError as error:
    if line := object_stores.missing_package(error):
      raise DataError(line) from error
    raise DataError(
      f"tfds:{name} is not in {where}, and TFDS's code that builds it needs TensorFlow or another package that is "
      f"missing ({error}); where that is installed (pip install tensorflow), prepare it with",
      f"  {prepare_command('build', name, tfds_dir)}",
    ) from error
  except tfds.core.DatasetNotFoundError as error:
    hint = re.search(r"Did you mean[^?\n]*\?", str(error))
    raise DataError(
      f"TFDS knows no data set {name!r}, and none lies in {where}. {hint[0] if hint else ''} "
      "Check the name, or where it lies with --config.data.tfds_dir=DIR"
    ) from error
  except (ValueError, AssertionError) as error:  # a configuration or version that does not exist
    raise DataError(f"tfds:{name}: {error}") from error


def prepare_command(action: str, name: str, tfds_dir: str) -> str:
  """Returns the command line that builds or converts a data set."""
  where = f" --tfds-dir={shlex.quote(tfds_dir)}" if tfds_dir else ""
  return f"python -m megabyte_jax prepare {action} {shlex.quote(f'tfds:{name}')}{where}"


def _check_prepared(builder: Any, name: str, tfds_dir: str) -> None:
  folder = epath.Path(builder.data_dir)
  if not builder.info.splits:
    manual = ""
    if getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None):
      root = tfds_dir or builder.data_dir_root
      manual = f" (its files must be fetched by hand first, into {root}/downloads/manual)"
    command = prepare_command("build", name, tfds_dir)
    raise DataError(f"tfds:{name} is not in {folder}; prepare it with", f"  {command}{manual}")
  formats = {form.value for form in builder.info.available_file_formats()}
  if "array_record" not in formats:
    raise DataError(
      f"tfds:{name} in {folder} is stored as {', '.join(sorted(formats))}, which cannot be read at random; convert it "
      "with",
      f"  {prepare_command('convert', name, tfds_dir)}",
      "which needs no TensorFlow and leaves the old files alone",
    )


def _find_feature(builder: Any, kinds: tuple[type, ...], wanted: str, spec: str, form: str) -> str:
  """The feature of the wanted kind; where there are several texts, the one called text or ..._text."""
  features = dict(builder.info.features.items()) if hasattr(builder.info.features, "items") else {}
  fitting = [name for name, kind in features.items() if isinstance(kind, kinds) and (form == "image" or _is_text(kind))]
  if wanted:
    require(wanted in fitting, f"{spec} has no {form} feature {wanted!r}; there are {', '.join(fitting) or 'none'}")
    return wanted
  if len(fitting) > 1:
    fitting = [name for name in fitting if re.fullmatch(r"(.*_)?(text|content|image)", name)]
  require(
    len(fitting) == 1,
    f"{spec} does not say which feature to read as config.data.form={form}; add #FEATURE, one of {', '.join(features)}",
  )
  return fitting[0]


def _is_text(kind: Any) -> bool:
  return kind.shape == () and kind.np_dtype in (np.str_, np.bytes_, object)


class Records:
  """One feature of the records of a split, as stored (images encoded, text in UTF-8)."""

  skipped = 0

  def __init__(self, builder: Any, split: str, feature: str, spec: str):
    from tensorflow_datasets.proto import tf_example_pb2  # noqa: PLC0415

    self.spec, self.feature = spec, feature
    try:
      self._info = builder.info.splits[split]
    except (ValueError, KeyError) as error:
      raise DataError(f"{spec}: no such split; there are {', '.join(builder.info.splits)}") from error
    if self._info.num_examples < 1:
      raise DataError(
        f"{spec} names no records; see https://www.tensorflow.org/datasets/splits for how a part is named"
      )
    # Chooses the format, on which the names of the files depend that are asked for below; it opens none of them.
    builder.as_data_source(split, file_format="array_record")
    self._parse = tf_example_pb2.Example.FromString
    self._shards = builder.info.splits[split].file_instructions
    self._ends = list(itertools.accumulate(shard.take for shard in self._shards))
    self._reader = Handles(functools.partial(_open_shard, self._shards))
    self.names = Numbered([spec], [self._ends[-1]])

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the shards (as `fingerprint_files`) and with the part of them that is read."""
    paths = [str(shard.filename) for shard in self._shards]
    names = [path.rsplit("/", 1)[-1] for path in paths]
    part = repr([(shard.skip, shard.take) for shard in self._shards])
    return combine_fingerprints([fingerprint_files(paths, names, sizes_of(paths)), part, self.feature])

  def place(self, i: int) -> str:
    """Returns where it is; see `EncodedMedia`."""
    return self.names[i]

  def load(self, i: int) -> bytes:
    """Returns the stored bytes of record number i. Raises DataError naming it and its file."""
    k = bisect.bisect_right(self._ends, i)
    shard = self._shards[k]
    place = i - self._ends[k] + shard.take + shard.skip
    try:
      # Without TFDS's layers in between, and with a parser of one feature: a small record is read in half the time.
      [record] = self._reader(k).read([place])
      [value] = self._parse(record).features.feature[self.feature].bytes_list.value
      return value
    except DataError:  # too many open files
      raise
    except Exception as error:  # the reader has no error of its own
      raise DataError(f"{self.names[i]} (record {place} of {shard.filename}) cannot be read: {error}") from error


def _open_shard(shards: Sequence[Any], k: int) -> Any:
  """The reader of shard k. Raises ValueError where that is damaged: for some that were cut short it reads nothing."""
  from array_record.python import array_record_module  # noqa: PLC0415

  shard = shards[k]
  options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 15}  # for reading at random
  reader = array_record_module.ArrayRecordReader(str(shard.filename), **options)
  if not reader.ok() or reader.num_records() != shard.examples_in_shard:
    left = f"{reader.num_records()} of {shard.examples_in_shard} records are left"
    reader.close()
    require_descriptor()
    raise ValueError(f"the file is damaged, {left}; prepare it again")
  return reader


class Texts:
  """One document per text. Their lengths are found by reading all of them once, when the source is opened."""

  joinable, unit, slow = True, 1, True

  def __init__(self, records: Records, data: DataConfig):
    self._records, skip_bad = records, data.skip_bad
    count = len(records.names)
    if count > 1000:
      logging.warning(
        "reading %s once to learn the lengths of its %d texts; pack it to start at once: %s",
        *(records.spec, count, pack_command(records.spec, data)),
      )
    with ThreadPoolExecutor() as pool:
      lengths = np.array(list(pool.map(lambda i: self._length(i, skip_bad), range(count))), np.int64)
    self._kept = np.flatnonzero(lengths)
    self.skipped = count - len(self._kept)
    self.skipped_names = [records.names[i] for i in np.flatnonzero(lengths == 0)]
    if not len(self._kept):
      raise DataError(f"all {count} texts of {records.spec} are empty or unreadable")
    self.lengths = lengths[self._kept]
    self.names = [records.names[i] for i in self._kept]
    self._text = SharedCache(records.load, _RECORDS_KEPT)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the records, and with how many were left out."""
    return combine_fingerprints([self._records.fingerprint, str(self.skipped)])

  def _length(self, i: int, skip_bad: bool) -> int:
    try:
      length = len(self._records.load(i))
      if length or skip_bad:
        return length
      raise DataError(f"{self._records.names[i]} is empty; skip such texts with {SKIP_HINT}")
    except DataError:
      if skip_bad:
        return 0
      raise

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Reads bytes; see `Source`."""
    check_range(self, document, start, stop)
    return np.frombuffer(self._text(int(self._kept[document])), np.uint8)[start:stop].copy()
