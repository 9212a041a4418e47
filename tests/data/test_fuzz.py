"""A few thousand damaged files through every decoder: an error that names the file, or the data, but nothing else."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import pathlib
import tarfile
import time
import zipfile

import numpy as np
import pytest
import tfds_copies
from PIL import Image, features

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data.media import audio, image_decoding, image_scaling
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.packing import archives
from megabyte_jax.errors import DataError

SECONDS = 2.0  # more for one small file is a hang


def damaged(data, rng):
  """A copy cut short, with bytes changed, dropped, put in or zeroed."""
  out, kind = bytearray(data), rng.integers(5)
  place = int(rng.integers(len(out)))
  if kind == 0:
    return bytes(out[:place])
  if kind == 1:
    for _ in range(int(rng.integers(1, 4))):
      out[int(rng.integers(len(out)))] ^= int(rng.integers(1, 256))
  elif kind == 2:
    del out[place : place + int(rng.integers(1, 40))]
  elif kind == 3:
    out[place:place] = rng.bytes(int(rng.integers(1, 40)))
  else:
    out[place : place + 64] = bytes(min(64, len(out) - place))
  return bytes(out)


def picture():
  """Small, smooth and noisy at once."""
  ramp = np.add.outer(np.arange(24), np.arange(32))[..., None] * [3, 2, 1]
  return (ramp + np.random.default_rng(0).integers(0, 40, (24, 32, 3))).astype(np.uint8)


def encoded_picture(kind):
  file = io.BytesIO()
  Image.fromarray(picture()).save(file, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
  return file.getvalue()


def encoded_sound(kind):
  file = io.BytesIO()
  wave = (8000 * np.sin(np.arange(3000) / 9) + np.random.default_rng(0).normal(0, 300, 3000)).astype(np.int16)
  soundfile = pytest.importorskip("soundfile")
  soundfile.write(file, wave, 8000, format=kind)
  return file.getvalue()


def each_damaged(data, count, check):
  """Calls check(damaged file, number) so many times; returns how many were refused with a DataError naming 'item'."""
  rng, refused = np.random.default_rng(len(data)), 0
  for i in range(count):
    changed = damaged(data, rng)
    started = time.perf_counter()
    try:
      check(changed)
    except DataError as error:
      assert "item" in str(error), error
      refused += 1
    assert time.perf_counter() - started < SECONDS, i
  return refused


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "MPO"])
def test_damaged_pictures(kind):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow reads no AVIF")
  data = encoded_picture(kind)
  whole = np.asarray(image_decoding.open_image(data, "item"))

  def check(changed):
    image = image_decoding.open_image(changed, "item")
    assert image.mode == "RGB"
    if kind == "PNG":  # the one with checksums: what is not refused is the picture
      np.testing.assert_array_equal(np.asarray(image), whole)
    image_scaling.square_image(image, 16)

  many = 700 if kind in ("PNG", "JPEG", "WEBP") else 300
  assert each_damaged(data, many, check) > many // 5


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
def test_damaged_compressed_tiffs(compression):
  file = io.BytesIO()
  Image.fromarray(picture()).save(file, format="TIFF", compression=compression)

  def check(changed):
    assert image_decoding.open_image(changed, "item", "all").mode == "RGB"

  assert each_damaged(file.getvalue(), 150, check) > 20


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF"])
def test_heads_that_claim_any_size_are_refused_before_there_is_memory_for_it(kind):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow reads no AVIF")
  data = encoded_picture(kind)
  places = [*range(min(len(data), 64)), *range(max(64, len(data) - 200), len(data))]  # the head of a TIFF is its end
  opened = 0
  for place in places:
    for value in (b"\0", b"\x7f", b"\xff\xff"):
      changed = data[:place] + value + data[place + len(value) :]
      started = time.perf_counter()
      with contextlib.suppress(DataError):
        image = image_decoding.open_image(changed, "item", "all", max_pixels=100_000)
        assert image.width * image.height <= 100_000
        opened += 1
      assert time.perf_counter() - started < SECONDS, (place, value)
  assert opened or kind in ("PNG", "AVIF")  # not all was refused


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF", "AU", "CAF", "MP3"])
def test_damaged_recordings(kind, tmp_path):
  data, path = encoded_sound(kind), tmp_path / "item"
  path.write_bytes(data)
  whole, _ = audio.decode(str(path))

  def check(changed):
    path.write_bytes(changed)
    samples, rate = audio.decode(str(path))
    assert len(samples) and rate > 0
    if kind == "OGG":  # its pages have checksums, and those that are left out are counted
      assert len(samples) == len(whole)
    if kind == "FLAC" and data[26:42] == changed[26:42]:  # the checksum in the head is still there
      np.testing.assert_array_equal(samples, whole)

  many = 400 if kind in ("WAV", "FLAC", "OGG") else 200
  assert each_damaged(data, many, check) > many // 5


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF", "AU", "CAF"])
def test_heads_of_recordings_never_multiply_memory(kind, tmp_path):
  data, path, opened = encoded_sound(kind), tmp_path / "item", 0
  config = DataConfig(form="audio", sample_rate=8000)
  for place in range(min(len(data), 64)):
    for value in (b"\0", b"\xff", b"\0\0\1", b"\0\0\0\0", b"\xff\xff\xff\xff"):
      path.write_bytes(data[:place] + value + data[place + len(value) :])
      started = time.perf_counter()
      with contextlib.suppress(DataError):
        source = audio.AudioFiles([str(path)], ["item"], config)
        x = source.read(0, 0, int(source.lengths[0]))
        assert 0 < x.size <= 2 * 64 * 3000 * 4, (place, value)  # a head may say 8 bits where there were 32
        opened += 1
      assert time.perf_counter() - started < SECONDS, (place, value)
  assert opened > 20


def archive(kind):
  file, contents = (
    io.BytesIO(),
    {f"{i}.txt": bytes([65 + i]) * 300 + np.random.default_rng(i).bytes(50) for i in range(4)},
  )
  if kind == "zip":
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
      for name, data in contents.items():
        out.writestr(name, data)
    return file.getvalue(), contents
  with tarfile.open(fileobj=file, mode="w") as out:
    for name, data in contents.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      out.addfile(info, io.BytesIO(data))
  pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind[4:]]
  half = len(file.getvalue()) // 2  # in two streams
  return pack(file.getvalue()[:half]) + pack(file.getvalue()[half:]), contents


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_damaged_archives(kind, tmp_path):
  (data, contents), path = archive(kind), tmp_path / f"item.{kind}"

  def check(changed):
    path.write_bytes(changed)
    found = [b"".join(blocks) for _, blocks in archives.documents(str(path))]
    assert found == list(contents.values())  # all kinds carry checksums

  assert each_damaged(data, 300, check) > 250


def test_damaged_array_records(tmp_path):
  tfds_copies.downsampled_imagenet(tmp_path)
  [path] = pathlib.Path(tmp_path).rglob("*validation.array_record*")
  data, config = path.read_bytes(), DataConfig(form="image", tfds_dir=str(tmp_path))
  spec = "tfds:downsampled_imagenet/64x64:validation"
  source = open_path(spec, config)
  whole = [source.read(i, 0, 12288).tobytes() for i in range(4)]
  rng, refused = np.random.default_rng(0), 0
  for _ in range(150):
    path.write_bytes(damaged(data, rng))
    started = time.perf_counter()
    try:
      source = open_path(spec, config)
      assert [source.read(i, 0, 12288).tobytes() for i in range(4)] == whole
    except DataError as error:
      assert "validation" in str(error)
      refused += 1
    assert time.perf_counter() - started < SECONDS
  assert refused > 50


def test_damaged_packed_folders(tmp_path):
  text = tmp_path / "text"
  text.write_bytes(np.random.default_rng(0).bytes(2000))
  prepare.main(["pack", str(text), str(tmp_path / "item")])
  fingerprint = open_path(str(tmp_path / "item"), DataConfig()).fingerprint
  rng = np.random.default_rng(0)
  for name in ("manifest.json", "ends.npy", "data.bin"):
    path = tmp_path / "item" / name
    data = path.read_bytes()
    for _ in range(150):
      path.write_bytes(damaged(data, rng))
      try:
        source = open_path(str(tmp_path / "item"), DataConfig())
        found = source.read(0, 0, int(source.lengths[0])).tobytes()
        # Opening looks at sizes, and at the checksum of the small file alone: that of the data is for `verify`.
        if name != "data.bin":
          assert found == text.read_bytes()
        elif found != text.read_bytes():
          assert len(found) == 2000 and source.fingerprint != fingerprint
          with pytest.raises(DataError, match=r"data\.bin has changed"):
            prepare.main(["verify", str(tmp_path / "item")])
      except ValueError as error:
        assert "item" in str(error)
    path.write_bytes(data)


RECORDS = ["first", "second " * 30, "ünï" * 10, "x" * 500, "last"]


def json_lines():
  return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(RECORDS)).encode()


def zstd_frames(data):
  compressor = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True)
  return compressor.compress(data[:200]) + compressor.compress(data[200:])


def parquet_file(compression):
  arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  file = io.BytesIO()
  columns = {"text": RECORDS * 4, "number": list(range(20))}
  parquet.write_table(
    arrow.table(columns), file, compression=compression, row_group_size=7, write_page_checksum=compression == "zstd"
  )
  return file.getvalue()


RECORD_FILES = {
  "jsonl": json_lines,
  "jsonl.gz": lambda: gzip.compress(json_lines()),
  "jsonl.zst": lambda: zstd_frames(json_lines()),
  "txt.zst": lambda: pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(json_lines()),
  "none.parquet": lambda: parquet_file("none"),
  "snappy.parquet": lambda: parquet_file("snappy"),
  "zstd.parquet": lambda: parquet_file("zstd"),
}


@pytest.mark.parametrize("kind", RECORD_FILES)
def test_damaged_records(kind, tmp_path):
  """With and without skip_bad, and an index that is damaged as well."""
  data, path = RECORD_FILES[kind](), tmp_path / f"item.{kind}"
  count = [0]

  def check(changed):
    path.write_bytes(changed)
    count[0] += 1
    config = DataConfig(cache_dir=str(tmp_path / "cache"), skip_bad=count[0] % 2 == 0)
    source = open_path(str(path), config)
    found = [source.read(i, 0, int(length)).tobytes() for i, length in enumerate(source.lengths)]
    assert all(found)
    if kind in ("jsonl.gz", "jsonl.zst", "txt.zst"):  # they carry checksums: what is not refused is the data
      whole = [json_lines()] if kind == "txt.zst" else [text.encode() for text in RECORDS]
      assert found == whole

  assert each_damaged(data, 250, check) > 60


def test_damaged_indexes_are_made_anew(tmp_path):
  path, config = tmp_path / "item.jsonl", DataConfig(cache_dir=str(tmp_path / "cache"))
  path.write_bytes(json_lines())
  open_path(str(path), config)
  [index] = (tmp_path / "cache" / "indexes").glob("*.index")
  data, rng = index.read_bytes(), np.random.default_rng(0)
  for _ in range(200):
    index.write_bytes(damaged(data, rng))
    source = open_path(str(path), config)
    assert [source.read(i, 0, int(n)).tobytes() for i, n in enumerate(source.lengths)] == [t.encode() for t in RECORDS]
