"""Turns data sets, folders and archives into what training reads.

  python -m megabyte_jax prepare pack SOURCE FOLDER    any source (see data/open_data.py) or archive of text files
                                                             -> one packed folder; then --config.data.train=FOLDER
  python -m megabyte_jax prepare build tfds:NAME       downloads and prepares a TFDS data set as ArrayRecord
  python -m megabyte_jax prepare convert tfds:NAME     TFRecord files -> ArrayRecord, without TensorFlow
  python -m megabyte_jax prepare verify FOLDER         checks the checksums of a packed folder
  python -m megabyte_jax prepare tokenizer SOURCE... OUT.model    trains a SentencePiece model on texts, for
                                                             --config.data.form=subwords

`pack`, `build` and `convert` show their progress, and after an interruption the same command goes on with `pack` and
`convert`. Nothing that looks whole is ever half written.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import get_args, get_type_hints

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import command_line
from megabyte_jax.config import DataConfig
from megabyte_jax.config.parsing import attribute_texts, dataclass_from_mapping
from megabyte_jax.errors import ConfigError, require
from megabyte_jax.files.outputs import (
  check_folder_name,
  check_new_file,
  check_on_disk,
  check_output_file,
  check_output_folder,
)

_SPLITS = ("train", "validation", "test", "train_weights", "documents")  # of no meaning here
_SUBWORDS = ("tokenizer", "tokenizer_sha256")  # texts are packed as bytes: any tokenizer then cuts them
_FORM = "what becomes of an item: bytes, as it is, also for subwords | image, its pixels | audio, its samples"
_OF_IMAGES = ("image_size", "image_tiles", "max_pixels", "convert_images", "scan", "scan_patch")
_OF_AUDIO = ("sample_rate", "encoding")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own)."""
  parser = flags.Parser(flags.called("prepare"), description=__doc__)
  commands = parser.add_subparsers(dest="command", required=True)
  packing = commands.add_parser("pack", help="any source or archive -> one packed folder")
  packing.add_argument("source", type=flags.path)
  packing.add_argument("folder", type=flags.path)
  types, texts = get_type_hints(DataConfig), attribute_texts(DataConfig) | {"form": _FORM}
  for field in dataclasses.fields(DataConfig):
    if field.name in _SPLITS + _SUBWORDS:
      continue
    name = f"--{field.name.replace('_', '-')}"
    if isinstance(field.default, bool):
      packing.add_argument(name, action="store_true", help=texts.get(field.name))
    else:
      wanted = flags.path if isinstance(field.default, str) else type(field.default)
      choices = tuple(choice for choice in get_args(types[field.name]) if choice != "subwords")
      text = "; ".join(filter(None, (texts.get(field.name), f"default: {field.default}" * bool(field.default))))
      packing.add_argument(name, type=wanted, default=field.default, choices=choices or None, help=text)
  for name, text in (("build", "download and prepare a TFDS data set"), ("convert", "TFRecord -> ArrayRecord")):
    command = commands.add_parser(name, help=text)
    command.add_argument("name", help="tfds:NAME")
    command.add_argument("--tfds-dir", type=flags.path, default="", help=texts.get("tfds_dir"))
    if name == "convert":
      command.add_argument(
        "--out", type=flags.path, default="", help="another TFDS folder to write to; default: beside the old files"
      )
  commands.add_parser("verify", help="check a packed folder").add_argument("folder", type=flags.path)
  tokenizer = commands.add_parser("tokenizer", help="texts -> a SentencePiece model")
  tokenizer.add_argument("sources", nargs="+", metavar="SOURCE", type=flags.path)
  tokenizer.add_argument("out", type=flags.path)
  tokenizer.add_argument("--force", action="store_true", help="overwrite OUT, if it exists")
  tokenizer.add_argument("--pieces", type=int, default=32_000, help="the size of the vocabulary, 256 bytes included")
  tokenizer.add_argument("--sample-bytes", type=int, default=10**8, help="of the texts, looked at evenly spaced")
  for name in ("skip_bad", "raw"):
    tokenizer.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=texts.get(name))
  for name in ("cache_dir", "tfds_dir"):
    tokenizer.add_argument(f"--{name.replace('_', '-')}", type=flags.path, default="", help=texts.get(name))
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  """Reads the command line and does as it says; raises what a person can put right (see command_line.run)."""
  given = vars(parse_arguments(arguments))
  command = given.pop("command")
  try:
    if command == "pack":
      from megabyte_jax.data.folders import inside_source
      from megabyte_jax.data.packing.pack import pack

      spec, folder = given.pop("source"), given.pop("folder")
      check_folder_name("FOLDER", folder)
      check_on_disk("FOLDER", folder)
      check_output_folder("FOLDER", folder)
      inside = inside_source(folder, spec)
      require(not inside, f"FOLDER={folder} lies within the source {inside}, which it would change; take another place")
      data = dataclass_from_mapping(DataConfig, given, "option")
      for form, names in (("image", _OF_IMAGES), ("audio", _OF_AUDIO)):
        for name in (name for name in names if data.form != form and getattr(data, name) != getattr(DataConfig, name)):
          raise ConfigError(f"--{name.replace('_', '-')} goes with --form={form}, but the form is {data.form}")
      pack(spec, folder, data)
    elif command == "verify":
      from megabyte_jax.data.packing import packed_folder

      packed_folder.verify(given["folder"])
      print(f"{given['folder']} is whole")
    elif command == "tokenizer":
      from megabyte_jax.data.subwords.training import train_tokenizer

      sources, out = given.pop("sources"), given.pop("out")
      pieces, sample_bytes = given.pop("pieces"), given.pop("sample_bytes")
      check_output_file("OUT", out)
      if not given.pop("force"):
        check_new_file("OUT", out)
      made = train_tokenizer(sources, out, pieces, dataclass_from_mapping(DataConfig, given, "option"), sample_bytes)
      print(f"{out}: {made.size:,} pieces, SHA-256 {made.sha256}")
    else:
      from megabyte_jax.data.packing import prepare_tfds

      getattr(prepare_tfds, command)(given.pop("name").removeprefix("tfds:"), **given)
  except KeyboardInterrupt:
    if command in ("pack", "convert"):
      print("the same command goes on from here", file=sys.stderr)
    raise


if __name__ == "__main__":
  command_line.run(main)
