"""Packs the documents of any source, or of an archive of texts, into one folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.packing import archives, packed
from megabyte_jax.data.packing.pack_writer import PackWriter
from megabyte_jax.data.read_ahead import read_ahead
from megabyte_jax.data.sources import Source
from megabyte_jax.errors import DataError

_BLOCK = 1 << 24  # bytes read at once of a long document


def pack(spec: str, folder: str, data: DataConfig) -> None:
  """Writes the documents of a source, or of an archive of text files, to a packed folder.

  Interrupted, it goes on where it was when it is called again with the same arguments and unchanged data.

  Raises:
    DataError: the data cannot be read, the folder holds something else, or the disk is full.
  """
  if archives.is_archive(spec):
    if data.form != "bytes":
      raise DataError(f"{spec}: only text is read from archives; unpack it and name the folder")
    writer = PackWriter(folder, _request(spec, archives.fingerprint(spec), data))
    place = [0]
    documents = archives.documents(spec, writer.items_done, data.skip_bad, on_place=lambda at: place.__setitem__(0, at))
    writer.write(documents, total_bytes=os.path.getsize(spec), place=lambda: place[0])
  else:
    source = open_path(spec, data)
    writer = PackWriter(folder, _request(spec, source.fingerprint, data), source.unit)
    writer.write(_documents(source, writer.items_done), total_bytes=int(source.lengths.sum()), skipped=source.skipped)
  manifest = packed.Packed(folder, data).manifest
  print(f"{folder}: {manifest['documents']:,} documents, {manifest['bytes']:,} bytes", end="")
  print(f", {manifest['skipped']:,} skipped" if manifest["skipped"] else "")


def _request(spec: str, fingerprint: str, data: DataConfig) -> dict:
  return {"source": spec, "fingerprint": fingerprint, "settings": packed.settings_of(data), "skip_bad": data.skip_bad}


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
