"""Turns data sets, folders and archives into what training reads.

  python -m megabyte_jax.data.prepare pack SOURCE FOLDER    any source (see data/open_data.py) or archive of text files
                                                            -> one packed folder; then --config.data.train=FOLDER
  python -m megabyte_jax.data.prepare build tfds:NAME       downloads and prepares a TFDS data set as ArrayRecord
  python -m megabyte_jax.data.prepare convert tfds:NAME     TFRecord files -> ArrayRecord, without TensorFlow
  python -m megabyte_jax.data.prepare verify FOLDER         checks the checksums of a packed folder

All show their progress and can be interrupted and started again; nothing that looks whole is ever half written.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence

from megabyte_jax.arguments import Parser
from megabyte_jax.config import DataConfig
from megabyte_jax.config_parsing import dataclass_from_mapping
from megabyte_jax.data import archives, packed
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.pack_writer import PackWriter
from megabyte_jax.data.read_ahead import read_ahead
from megabyte_jax.data.sources import DataError, Source
from megabyte_jax.outputs import check_output_folder

_BLOCK = 1 << 24  # bytes read at once of a long document
_SPLITS = ("train", "validation", "test", "train_weights", "documents")  # of no meaning here


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


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line; raises what a person can put right (see command_line.run)."""
  parser = Parser("python -m megabyte_jax.data.prepare", description=__doc__)
  commands = parser.add_subparsers(dest="command", required=True)
  packing = commands.add_parser("pack", help="any source or archive -> one packed folder")
  packing.add_argument("source")
  packing.add_argument("folder")
  for field in dataclasses.fields(DataConfig):
    if field.name in _SPLITS:
      continue
    name = f"--{field.name.replace('_', '-')}"
    if isinstance(field.default, bool):
      packing.add_argument(name, action="store_true")
    else:
      packing.add_argument(name, type=type(field.default), default=field.default)
  for name, text in (("build", "download and prepare a TFDS data set"), ("convert", "TFRecord -> ArrayRecord")):
    command = commands.add_parser(name, help=text)
    command.add_argument("name", help="tfds:NAME")
    command.add_argument("--tfds-dir", default="")
    if name == "convert":
      command.add_argument("--out", default="", help="another TFDS folder to write to; default: beside the old files")
  commands.add_parser("verify", help="check a packed folder").add_argument("folder")
  given = vars(parser.parse_args(arguments))
  command = given.pop("command")
  try:
    if command == "pack":
      spec, folder = given.pop("source"), given.pop("folder")
      check_output_folder("FOLDER", folder)
      pack(spec, folder, dataclass_from_mapping(DataConfig, given, "option"))
    elif command == "verify":
      packed.verify(given["folder"])
      print(f"{given['folder']} is whole")
    else:
      from megabyte_jax.data import tfds_files  # noqa: PLC0415

      getattr(tfds_files, command)(given.pop("name").removeprefix("tfds:"), **given)
  except KeyboardInterrupt:
    print("the same command goes on from here", file=sys.stderr)
    raise


if __name__ == "__main__":
  from megabyte_jax import command_line

  command_line.run(main)
