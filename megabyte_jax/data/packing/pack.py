"""Packs the documents of any source, or of archives and compressed files, into one folder."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from megabyte_jax.config import DataConfig
from megabyte_jax.data.fingerprints import combine_fingerprints
from megabyte_jax.data.media.image_source import notice_of_scaling
from megabyte_jax.data.open_data import decodable_as, open_path
from megabyte_jax.data.packing import archives, packed_folder
from megabyte_jax.data.packing.archives import Item
from megabyte_jax.data.packing.pack_writer import PackWriter
from megabyte_jax.data.packing.streams import Stream, stream_of
from megabyte_jax.data.packing.streams import documents as stream_documents
from megabyte_jax.data.read_ahead import read_ahead
from megabyte_jax.data.source_names import split_list
from megabyte_jax.data.sources import Source, documents_in_words
from megabyte_jax.errors import DataError

_BLOCK = 1 << 24  # bytes read at once of a long document


def pack(spec: str, folder: str, data: DataConfig) -> None:
  """Writes the documents of a source, or of archives and compressed files, to a packed folder.

  Interrupted, it goes on where it was when it is called again with the same arguments and unchanged data.

  Raises:
    DataError: the data cannot be read, the folder holds something else, or the disk is full.
  """
  if data.form != "bytes" and archives.is_archive(spec):
    raise DataError(f"{spec}: only text is read from archives; unpack it and name the folder")
  parts = split_list(spec)
  streams = [None if data.form != "bytes" or data.raw else stream_of(part) for part in parts]
  if any(streams):
    _pack_streams(spec, list(zip(parts, streams, strict=True)), folder, data)
  else:
    source = open_path(spec, data)
    if data.form == "bytes" and not data.raw and (form := decodable_as(source.names)):
      print(f"notice  these files are packed as they are; --form={form} decodes them", file=sys.stderr, flush=True)
    if scaled := notice_of_scaling(source):
      print(f"notice  {scaled}", file=sys.stderr, flush=True)
    writer = PackWriter(folder, _request(spec, source.fingerprint, data, source.skipped), source.unit)
    writer.write(_documents(source, writer.items_done), total_bytes=int(source.lengths.sum()), skipped=source.skipped)
  manifest = packed_folder.Packed(folder, data).manifest
  print(f"{folder}: {documents_in_words(manifest['documents'])}, {manifest['bytes']:,} bytes", end="")
  print(f", {manifest['skipped']:,} skipped" if manifest["skipped"] else "")


def _pack_streams(spec: str, parts: list[tuple[str, Stream | None]], folder: str, data: DataConfig) -> None:
  """Packs files from front to back, and with them any other sources that were named beside them."""
  opened: list[Stream | Source] = [stream or open_path(part, data) for part, stream in parts]
  total = sum(sum(part.sizes) if isinstance(part, Stream) else int(part.lengths.sum()) for part in opened)
  skipped = sum(0 if isinstance(part, Stream) else part.skipped for part in opened)
  fingerprint = combine_fingerprints(part.fingerprint for part in opened)
  writer = PackWriter(folder, _request(spec, fingerprint, data, skipped))
  done, place = writer.items_done, 0

  def items() -> Iterator[Item]:
    nonlocal place
    seen = before = 0

    def reached(at: int) -> None:
      nonlocal place
      place = before + at

    for part in opened:
      if isinstance(part, Stream):
        for item in stream_documents(part, data, reached):
          seen += 1
          if seen > done:  # those before are passed over without being decoded
            yield item
        before += sum(part.sizes)
      else:
        yield from _documents(part, max(0, done - seen))
        seen += len(part.lengths)
        before += int(part.lengths.sum())
      place = before

  writer.write(items(), total_bytes=total, skipped=skipped, place=lambda: place)


def _request(spec: str, fingerprint: str, data: DataConfig, skipped: int) -> dict:
  """What decides which items there are; `skipped` were left out before."""
  request = {
    "source": spec,
    "fingerprint": fingerprint,
    "settings": packed_folder.settings_of(data),
    "skip_bad": data.skip_bad,
  }
  if skipped:
    request["skipped"] = skipped
  if data.form == "image" and data.skip_bad:  # without skip_bad, larger images are errors and no others are left out
    request["max_pixels"] = data.max_pixels
  return request


def _documents(source: Source, first: int) -> Iterator[tuple[str, Iterator[bytes]]]:
  """(name, blocks) of the documents from number `first` on, read ahead."""
  lengths = source.lengths
  blocks = read_ahead(
    source,
    (
      (i, start, min(start + _BLOCK, int(lengths[i])))
      for i in range(first, len(lengths))
      for start in range(0, int(lengths[i]), _BLOCK)
    ),
  )
  for i in range(first, len(lengths)):
    count = -(-int(lengths[i]) // _BLOCK)
    yield source.names[i], (block.tobytes() for block in itertools.islice(blocks, count))
