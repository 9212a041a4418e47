"""Measures how fast bytes and images reach training, in MB of model bytes a second, and the wait for the first batch.

  python benchmarks/input_pipeline.py [--seconds=5]

Everything is made from the shipped samples in a temporary folder. Files are in the page cache: this measures the code,
not the disk. Aims on two cores: 100 MB/s for byte files and 64-pixel images, 15 MB/s for 640-pixel JPEGs, and a
start at step 1,000,000 within 2 s. Where other work is on the machine, MB per second of processor time says more than
MB/s; that time is compared with nothing.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import json
import os
import tempfile
import time

import numpy as np
from PIL import Image

from megabyte_jax.commands import command_line, prepare
from megabyte_jax.commands.arguments import Parser
from megabyte_jax.config import DataConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_source

STEP = 1_000_000
START_UP_AIM = 2.0  # seconds


@dataclasses.dataclass(frozen=True)
class Case:
  """Names what is measured: a source, the shape of a batch, and the aim in MB/s."""

  name: str
  data: DataConfig
  context: int
  batch_size: int
  aim: float


def photographs() -> list[str]:
  return sorted(glob.glob(f"{SAMPLE_FOLDER}/images/*/*.jpg"))


def make_tiles(folder: str) -> None:
  """Writes PNG files of 64 x 64 pixels, as downsampled_imagenet stores them."""
  os.makedirs(folder)
  for number, photo in enumerate(photographs()):
    with Image.open(photo) as image:
      image.thumbnail((960, 960))
      for i, j in np.ndindex(image.height // 64, image.width // 64):
        tile = image.crop((64 * j, 64 * i, 64 * j + 64, 64 * i + 64))
        tile.save(f"{folder}/{number}_{i}_{j}.png")


def make_tfds(tiles: str, root: str) -> None:
  """Writes the same PNG files, eight times over, as downsampled_imagenet/64x64: few are slow to shuffle."""
  import tensorflow_datasets as tfds  # noqa: PLC0415

  builder = tfds.builder("downsampled_imagenet/64x64", data_dir=root, file_format="array_record")
  examples = [{"image": io.BytesIO(open(path, "rb").read())} for path in 8 * sorted(glob.glob(f"{tiles}/*"))]  # noqa: SIM115
  builder._split_generators = lambda *_: {"train": list(enumerate(examples))}
  builder._make_download_manager = lambda **_: type("Nothing", (), {"downloaded_size": 0})()
  builder.download_and_prepare()


def make_photographs(folder: str, copies: int = 8) -> None:
  """Links the shipped photographs under several names each, so that the few decoded images kept at hand are no help."""
  os.makedirs(folder)
  for photo in photographs():
    for i in range(copies):
      os.symlink(photo, f"{folder}/{i}_{os.path.basename(photo)}")


def make_text(path: str, size: int = 1 << 28) -> None:
  with open(f"{SAMPLE_FOLDER}/text/train/moby_dick.txt", "rb") as file:
    text = file.read()
  with open(path, "wb") as file:
    for _ in range(size // len(text)):
      file.write(text)


def measure(case: Case, seconds: float) -> dict:
  """Measures MB/s after the first batches, and seconds from opening the source to the first batch of step 1,000,000."""
  started = time.perf_counter()
  source = open_source(case.data, "train")
  stream = batches(source, batch_size=case.batch_size, context=case.context, seed=0, first_step=STEP)
  next(stream)
  start_up = time.perf_counter() - started
  for _ in range(5):
    next(stream)
  started, total, processor = time.perf_counter(), 0, time.process_time()
  while time.perf_counter() - started < seconds:
    _, batch = next(stream)
    total += batch.x_BT.size
  rate = total / (time.perf_counter() - started) / 1e6
  per_cpu = total / (time.process_time() - processor) / 1e6
  return {
    "case": case.name,
    "MB/s": round(rate, 1),
    "MB/CPU-s": round(per_cpu, 1),
    "aim": case.aim,
    "start-up s": round(start_up, 2),
  }


def verdict(result: dict) -> str:
  """Names the aims that a result misses, or says `ok`."""
  missed = [f"below {result['aim']:g} MB/s"] if result["MB/s"] < result["aim"] else []
  missed += [f"start-up above {START_UP_AIM:g} s"] if result["start-up s"] > START_UP_AIM else []
  return ", ".join(missed) or "ok"


def main() -> None:
  parser = Parser("python benchmarks/input_pipeline.py", description=__doc__)
  parser.add_argument("--seconds", type=float, default=5.0)
  seconds = parser.parse_args().seconds
  with tempfile.TemporaryDirectory() as folder:
    make_text(f"{folder}/text")
    make_tiles(f"{folder}/tiles")
    make_photographs(f"{folder}/photographs")
    make_tfds(f"{folder}/tiles", f"{folder}/tfds")
    prepare.main(["pack", f"{folder}/tiles", f"{folder}/packed", "--form=image"])
    small = DataConfig(form="image", image_size=64)
    tfds_spec = "tfds:downsampled_imagenet/64x64:train"
    big = DataConfig(train=f"{folder}/photographs", form="image", image_size=640, scan_patch=192)
    cases = [
      Case("byte file, T=8192", DataConfig(train=f"{folder}/text"), 8192, 16, 100),
      Case("byte file, T=1024", DataConfig(train=f"{folder}/text"), 1024, 64, 100),
      Case("64 pixels, packed", dataclasses.replace(small, train=f"{folder}/packed"), 12288, 16, 100),
      Case(
        "64 pixels, TFDS (PNG)", dataclasses.replace(small, train=tfds_spec, tfds_dir=f"{folder}/tfds"), 12288, 16, 100
      ),
      Case("64 pixels, folder of PNG", dataclasses.replace(small, train=f"{folder}/tiles"), 12288, 16, 100),
      Case("640 pixels, folder of JPEG", big, 640 * 640 * 3, 2, 15),
    ]
    results = [measure(case, seconds) for case in cases]
  print(f"{os.cpu_count()} cores, {os.getloadavg()[0]:.1f} processes running")
  for r in results:
    rates = f"{r['MB/s']:8.1f} MB/s {r['MB/CPU-s']:8.1f} MB/CPU-s"
    print(f"{r['case']:28} {rates}  first batch after {r['start-up s']:.2f} s  {verdict(r)}")
  print(json.dumps(results))


if __name__ == "__main__":
  command_line.run(main)
