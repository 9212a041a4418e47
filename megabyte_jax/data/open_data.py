r"""Opens sources of bytes by their names, as the config says.

Several names are separated by commas (`\,` is a comma within a name); each is one of
  PATH          a file, a folder (all files below it, in sorted order) or a glob, local or gs://
  PATH#FIELD    the records of such files (.jsonl, .parquet, ...) and the field to read; without it `text`
  sample:NAME   a folder of the real data shipped with this package, such as sample:text/train
  tfds:NAME:SPLIT  a TFDS data set, such as tfds:downsampled_imagenet/64x64:validation
  hf:NAME:SPLIT  a data set that the package `datasets` reads, such as hf:NAME/CONFIG:train, or hf:FOLDER:train
One file, record, image or recording is one document. Files are read as what their endings say, compressed ones as what
they hold; `data.raw` takes the bytes of all files as they are.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

from megabyte_jax.config import DataConfig
from megabyte_jax.data import files, tfds_source
from megabyte_jax.data.folders import find_files
from megabyte_jax.data.media import audio, image_decoding, image_source
from megabyte_jax.data.packing import packed_folder
from megabyte_jax.data.pipes import is_special, open_pipe
from megabyte_jax.data.records import hugging_face
from megabyte_jax.data.records.file_types import open_documents, open_encoded
from megabyte_jax.data.records.hugging_face import HuggingFace
from megabyte_jax.data.records.store import RecordStore, RecordTexts
from megabyte_jax.data.source_names import split_field, split_list
from megabyte_jax.data.sources import Joined, Mixture, Source
from megabyte_jax.data.subwords.source import open_subwords
from megabyte_jax.errors import ConfigError, DataError, require
from megabyte_jax.files import object_stores

SAMPLE_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample")


def open_source(data: DataConfig, split: str) -> Source:
  """Opens the source of a split ("train", "validation", "test") as the configuration names it.

  Where `data.train_weights` are given, the training source is a `Mixture`.

  Raises:
    ConfigError: the split has no source, or weights do not fit it.
    DataError: nothing is there, or it cannot be read.
  """
  spec = data.source(split)
  try:
    if split != "train" or not data.train_weights:
      return open_path(spec, data)
    specs = split_list(spec)
    require(
      len(specs) == len(data.train_weights) and all(0 < weight < math.inf for weight in data.train_weights),
      f"config.data.train_weights {data.train_weights} must be {len(specs)} positive numbers, one for each of {spec!r}",
    )
    return Mixture([_open_one(one, data) for one in specs], data.train_weights, specs)
  except DataError as error:
    first, *others = error.args
    raise DataError(f"config.data.{split}: {first}", *others) from error


def open_path(spec: str, data: DataConfig, skip_empty: bool = False) -> Source:
  """Opens the source that `spec` names (see the head of this file), its items turned into bytes as `data` says.

  Args:
    skip_empty: leave out and count the empty files of a folder or glob (not one that is named itself) instead of
      raising DataError, for evaluation, where they cost nothing.

  Raises:
    ConfigError: the name cannot be understood.
    DataError: nothing is there, or it cannot be read.
  """
  specs = split_list(spec)
  sources = [_open_one(one, data, skip_empty) for one in specs]
  return sources[0] if len(sources) == 1 else Joined(sources, specs)


def decodable_as(names: Sequence[str]) -> str:
  """Returns the form of data, image or audio, that files of these names have; "" where not all of them have one."""
  endings = {"image": image_decoding.SUFFIXES, "audio": audio.SUFFIXES}
  return next((form for form, ends in endings.items() if all(name.lower().endswith(ends) for name in names)), "")


def _open_one(spec: str, data: DataConfig, skip_empty: bool = False) -> Source:
  if data.form == "subwords":
    text = dataclasses.replace(data, form="bytes", tokenizer="", tokenizer_sha256="")
    return open_subwords(_open_one(spec, text, skip_empty), data)
  if scheme := object_stores.unknown_scheme(spec):
    raise DataError(f"{spec}: no data can be read from {scheme}; copy them to a disk or a bucket (gs://)")
  if spec.startswith("sample:"):
    path = os.path.normpath(os.path.join(SAMPLE_FOLDER, spec.removeprefix("sample:").strip("/")))
    if not path.startswith(SAMPLE_FOLDER + os.sep) or not os.path.exists(path):
      known = sorted(os.path.relpath(root, SAMPLE_FOLDER) for root, dirs, _ in os.walk(SAMPLE_FOLDER) if not dirs)
      raise ConfigError(f"no sample data {spec!r}; there are {', '.join('sample:' + name for name in known)}")
    return _open_files(path, data, skip_empty)
  if spec.startswith("tfds:"):
    return tfds_source.open_tfds(spec, data)
  if spec.startswith("hf:") and not spec.startswith("hf://"):
    return _open_store(HuggingFace(spec, data), data)
  if is_special(spec):
    require(data.form == "bytes", f"{spec} is a pipe, which is read as bytes; config.data.form is {data.form!r}")
    return open_pipe(spec)
  return _open_files(spec, data, skip_empty)


def _open_files(spec: str, data: DataConfig, skip_empty: bool = False) -> Source:
  """The files that a path or glob names, as `data.form` says.

  Args:
    skip_empty: see `open_path`.

  Raises:
    DataError: there are none, or one is empty or cannot be read.
  """
  if packed_folder.is_packed(spec):
    return packed_folder.Packed(spec, data)
  path, field = split_field(spec)
  if not data.raw and hugging_face.is_saved(path):
    return _open_store(HuggingFace(f"hf:{path}" + (f"#{field}" if field else ""), data), data)
  if data.form == "bytes":
    if not data.raw:
      return open_documents(path, field, data, spec, skip_empty)
    paths, names = find_files(spec)
    return files.ByteFiles(paths, names, skip_bad=data.skip_bad, skip_empty=skip_empty and paths != [spec])
  suffixes = image_decoding.SUFFIXES if data.form == "image" else audio.SUFFIXES
  if store := open_encoded(path, field, data, spec, suffixes):
    return _open_store(store, data)
  if data.form == "image":
    return image_source.Images(image_source.ImageFiles(*find_files(spec, image_decoding.SUFFIXES, "images")), data)
  return audio.AudioFiles(*find_files(spec, audio.SUFFIXES, "recordings"), data)


def _open_store(store: RecordStore, data: DataConfig) -> Source:
  """The documents that records hold: images, recordings or texts."""
  if data.form == "image":
    return image_source.Images(store, data)
  if data.form == "audio":
    places = [store.place(i) for i in range(len(store.names))]
    return audio.AudioFiles(places, list(store.names), data, store)
  return RecordTexts(store)
