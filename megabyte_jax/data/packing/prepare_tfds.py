"""Builds TFDS data sets, and turns TFRecord copies of them into ArrayRecord files without TensorFlow."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from tensorboardX.crc32c import crc32c

from megabyte_jax.data.files import sizes_of
from megabyte_jax.data.tfds_source import find_builder
from megabyte_jax.display.progress import Progress
from megabyte_jax.errors import DataError
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.json_files import read_json

_INFO = "dataset_info.json"


def build(name: str, tfds_dir: str = "") -> None:
  """Downloads a TFDS data set and prepares it as ArrayRecord (TFDS itself takes care that it appears as a whole).

  Raises:
    DataError: TFDS needs TensorFlow for this one, or files that must be fetched by hand.
  """
  import tensorflow_datasets as tfds  # noqa: PLC0415

  builder = find_builder(name, tfds_dir)
  if builder.info.splits:
    print(f"tfds:{name} is in {builder.data_dir} already")
    return
  try:
    builder.download_and_prepare(file_format="array_record")
  except (ImportError, AttributeError) as error:
    if "tensorflow" not in str(error).lower():
      raise
    message = f"TFDS builds {name} with TensorFlow, which is needed for nothing else here: pip install tensorflow"
    raise DataError(message) from error
  except (AssertionError, tfds.download.DownloadError, OSError) as error:
    raise DataError(f"tfds:{name} cannot be built: {error}") from error
  print(f"tfds:{name} is in {builder.data_dir}")


def convert(name: str, tfds_dir: str = "", out: str = "") -> None:
  """Writes the ArrayRecord files of a data set that is stored as TFRecord files.

  They go beside the old files, or below the TFDS folder `out`; the records are the same, in the same order. Shards that
  are there already are kept, so an interrupted conversion goes on where it was; that the data set has them is noted
  last.

  Raises:
    DataError: a shard is damaged, cut short, or does not hold as many records as the data set's description says.
  """
  builder = find_builder(name, tfds_dir)
  source = epath.Path(builder.data_dir)
  if not builder.info.splits:
    raise DataError(f"tfds:{name} is not in {source}; nothing to convert")
  target = epath.Path(out) / builder.info.full_name if out else source
  description = read_json(source / _INFO, DataError, "prepare the data set again")
  if "array_record" in {f.value for f in builder.info.available_file_formats()} and target == source:
    print(f"tfds:{name} has ArrayRecord files in {source} already")
    return
  target.mkdir(parents=True, exist_ok=True)
  shards: list[tuple[str, str, int]] = []
  for split in builder.info.splits.values():
    old = split.filename_template.replace(filetype_suffix="tfrecord")
    new = old.replace(filetype_suffix="array_record", data_dir=target)
    names = (map(str, files.sharded_filepaths(split.num_shards)) for files in (old, new))
    shards += zip(*names, split.shard_lengths, strict=True)
  shards = [shard for shard in shards if not epath.Path(shard[1]).exists()]
  with Progress("converting", sum(max(0, size) for size in sizes_of([old for old, _, _ in shards]))) as progress:
    for old, new, count in shards:
      _convert_shard(epath.Path(old), epath.Path(new), count, progress)
  if target == source:
    description.setdefault("fileFormat", "tfrecord")
    description["alternativeFileFormats"] = sorted({*description.get("alternativeFileFormats", ()), "array_record"})
  else:
    description["fileFormat"] = "array_record"
    description.pop("alternativeFileFormats", None)
    for path in source.iterdir():
      if path.suffix in (".json", ".txt") and path.name != _INFO:
        path.copy(target / path.name, overwrite=True)
  with replacing(target / _INFO) as temporary:
    temporary.write_text(json.dumps(description, indent=2))
  print(f"tfds:{name} can be read at random from {target}")


def _convert_shard(old: epath.Path, new: epath.Path, count: int, progress: Progress) -> None:
  from array_record.python import array_record_module  # noqa: PLC0415

  with replacing(new) as temporary:
    written = 0
    try:
      writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
      try:
        for record in tfrecords(old):
          writer.write(record)
          written += 1
          progress.add(16 + len(record))
      finally:
        writer.close()
    except RuntimeError as error:  # the writer's only error
      raise DataError(
        f"{new} cannot be written ({error}); is there room on the disk? Run the same command again"
      ) from error
    if written != count:
      raise DataError(f"{old} holds {written:,} records, and the data set's description says {count:,}")
    reader = array_record_module.ArrayRecordReader(str(temporary))  # a full disk is not an error to the writer
    whole = reader.ok() and reader.num_records() == count
    reader.close()
    if not whole:
      raise DataError(f"{new} could not be written as a whole; is there room on the disk? Run the same command again")


def tfrecords(path: epath.Path) -> Iterator[bytes]:
  """Yields the records of a TFRecord file, checksums verified: of lengths always, of contents with google-crc32c.

  A record is its length (8 bytes), that number's checksum (4), the contents, their checksum (4), little-endian.

  Raises:
    DataError: names the file and the byte where it is damaged or ends too early.
  """
  place, fast = 0, fast_crc32c()
  try:
    with path.open("rb") as file:
      while head := file.read(12):
        size = int.from_bytes(head[:8], "little")
        if len(head) < 12 or _masked(crc32c(head[:8])) != int.from_bytes(head[8:], "little"):
          raise DataError(f"{path} is damaged at byte {place:,}; fetch it again")
        record, crc = file.read(size), file.read(4)
        if len(record) < size or len(crc) < 4:
          raise DataError(f"{path} is cut short in the record at byte {place:,}; fetch it again")
        if fast and _masked(fast(record)) != int.from_bytes(crc, "little"):
          raise DataError(f"{path} is damaged in the record at byte {place:,}; fetch it again")
        yield record
        place += 16 + size
  except OSError as error:
    raise DataError(f"{path} cannot be read ({error})") from error


def fast_crc32c() -> Callable[[bytes], int] | None:
  """Imports a compiled checksum, or returns None; one in Python would take hours over a real data set."""
  try:
    module: Any = importlib.import_module("google_crc32c")
    return module.value
  except ImportError:
    return None


def _masked(crc: int) -> int:
  """TFRecord stores checksums rotated and shifted."""
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
