"""Compresses files with a trained model and with general compressors, and says how small and how slow each is.

  python benchmarks/file_compression.py FILE... --workdir=pretrained:books --output=compression.json

For each file: bits per byte of the model's compressed file, header included, of gzip -9, bzip2 -9 and xz -9e, of zstd
-19 where the package zstandard is installed, and of the context-mixing zpaq -m5 where that program is on the PATH.
Every file is decompressed again and compared unless --no-check is given; that takes as long as compressing.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence

import jax

from megabyte_jax.checkpoints.trained_model import load
from megabyte_jax.commands import command_line
from megabyte_jax.commands.arguments import Parser, add_run_arguments
from megabyte_jax.errors import DataError
from megabyte_jax.evaluation.compressors import COMPRESSORS
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.generation.compression import compress, decompress

MODEL = "model"


def general_sizes(data: bytes) -> dict[str, int]:
  """Returns the bytes that each general compressor at hand makes of `data`."""
  sizes = {name: size(data) for name, size in COMPRESSORS.items()}
  try:
    import zstandard  # noqa: PLC0415 - an extra

    sizes["zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(data))
  except ImportError:
    pass
  if program := shutil.which("zpaq"):
    with tempfile.TemporaryDirectory() as folder:
      with open(os.path.join(folder, "data"), "wb") as file:
        file.write(data)
      command = [program, "add", "packed.zpaq", "data", "-m5"]
      subprocess.run(command, cwd=folder, check=True, capture_output=True)
      sizes["zpaq -m5"] = os.path.getsize(os.path.join(folder, "packed.zpaq"))
  return sizes


def measure(model, step: int, path: str, check: bool) -> dict:
  """Measures one file's bits per byte by each compressor, and the seconds that the model took."""
  with open(path, "rb") as file:
    data = file.read()
  start = time.perf_counter()
  packed = compress(model, data, step=step)
  seconds = time.perf_counter() - start
  if check and decompress(model, packed) != data:
    raise DataError(f"{path} did not come back as it was")
  sizes = {MODEL: len(packed), **general_sizes(data)}
  bits = {name: 8 * size / max(1, len(data)) for name, size in sizes.items()}
  return {"file": os.path.basename(path), "bytes": len(data), "bits_per_byte": bits, "seconds": round(seconds, 1)}


def as_table(rows: Sequence[dict]) -> str:
  """Renders the rows as Markdown; the smallest of each is bold."""
  names = list(rows[0]["bits_per_byte"])
  lines = ["| file | bytes | " + " | ".join(names) + " | seconds |", "| --- |" + " ---: |" * (len(names) + 2)]
  for row in rows:
    best = min(row["bits_per_byte"].values())
    cells = [f"**{bits:.3f}**" if bits == best else f"{bits:.3f}" for bits in row["bits_per_byte"].values()]
    lines.append(f"| {row['file']} | {row['bytes']:,} | {' | '.join(cells)} | {row['seconds']:.0f} |")
  return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures each file and prints the table."""
  parser = Parser("python benchmarks/file_compression.py", description=__doc__)
  parser.add_argument("files", nargs="+", metavar="FILE")
  add_run_arguments(parser)
  parser.add_argument("--no-check", action="store_true", help="do not decompress")
  parser.add_argument("--output", default="", metavar="FILE.json", help="where the figures go, too")
  args = parser.parse_args(arguments)
  model, _, step = load(args.workdir, args.step)
  rows = []
  for path in args.files:
    rows.append(measure(model, step, path, not args.no_check))
    print(json.dumps(rows[-1]), flush=True)
  print(as_table(rows))
  if args.output:
    device = jax.devices()[0]
    about = {"workdir": args.workdir, "step": step, "device": device.device_kind, "cores": os.cpu_count()}
    about |= {"jax": jax.__version__, "date": datetime.date.today().isoformat()}
    with replacing(args.output) as file:
      file.write_text(json.dumps(about | {"files": rows}, indent=1) + "\n")


if __name__ == "__main__":
  command_line.run(main)
