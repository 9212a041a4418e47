import io
import shutil
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megabyte_jax.config import DataConfig
from megabyte_jax.data.batches import batches, open_windows
from megabyte_jax.data.media import image_decoding, image_scaling, patch_scan, pictures
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_path
from megabyte_jax.errors import ConfigError, DataError

SMALL = DataConfig(form="image", image_size=32)


def random_image(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encode(array, kind="PNG", mode=None, **options):
  file = io.BytesIO()
  Image.fromarray(array, mode).save(file, format=kind, **options)
  return file.getvalue()


def test_square_keeps_the_middle_and_leaves_the_right_size_alone():
  wide = np.zeros((64, 192, 3), np.uint8)
  wide[:, 64:128] = 200
  square = image_scaling.square_image(Image.fromarray(wide), 32)
  assert square.shape == (32, 32, 3) and (square[:, 2:-2] == 200).all()
  exact = random_image(32, 32)
  np.testing.assert_array_equal(image_scaling.square_image(Image.fromarray(exact), 32), exact)
  assert image_scaling.square_image(Image.fromarray(random_image(20, 50)), 64).shape == (64, 64, 3)


def test_image_folders_read_back_what_was_written(tmp_path):
  arrays = {}
  for i, kind in enumerate(("PNG", "WEBP")):
    arrays[f"{i}.{kind.lower()}"] = random_image(32, 32, i)
    (tmp_path / f"{i}.{kind.lower()}").write_bytes(encode(arrays[f"{i}.{kind.lower()}"], kind, lossless=True))
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "x.JPEG").write_bytes(encode(random_image(40, 60), "JPEG"))
  (tmp_path / "notes.txt").write_text("not an image")
  source = open_path(str(tmp_path), SMALL)
  assert source.names == ["0.png", "1.webp", "sub/x.JPEG"] and (source.lengths == 32 * 32 * 3).all()
  for i, array in enumerate(arrays.values()):
    x = source.read(i, 0, 3072)
    np.testing.assert_array_equal(patch_scan.bytes_to_image(x, "patch", 12), array)
    np.testing.assert_array_equal(source.read(i, 100, 200), x[100:200])


def test_shipped_photographs_become_batches():
  data = DataConfig(form="image", image_size=16)
  source = open_path("sample:images/validation", data)
  windows = open_windows(source, context=768, seed=0, documents="packed")
  assert not windows.packed and windows.per_epoch == 2  # an image stays a window, whatever is asked
  _, batch = next(batches(source, batch_size=2, context=768, seed=0))
  rows = {row.tobytes() for row in batch.x_BT}
  assert rows == {source.read(i, 0, 768).tobytes() for i in range(2)} and (batch.length_B == 768).all()


def test_tiles_are_disjoint_squares_of_the_scaled_photograph(tmp_path):
  photo = random_image(64, 100)
  (tmp_path / "photo.png").write_bytes(encode(photo))
  source = open_path(str(tmp_path), DataConfig(form="image", image_size=32, image_tiles=64, scan="raster"))
  assert source.names == [f"photo.png[{i},{j}]" for i in range(2) for j in range(3)]
  tile = patch_scan.bytes_to_image(source.read(4, 0, 3072), "raster")
  np.testing.assert_array_equal(tile, photo[32:64, 32:64])
  with pytest.raises(ConfigError, match="image_tiles 16"):
    open_path(str(tmp_path), DataConfig(form="image", image_size=32, image_tiles=16))


def test_fingerprint_follows_what_changes_the_bytes(tmp_path):
  (tmp_path / "a.png").write_bytes(encode(random_image(32, 32)))
  kinds = [
    DataConfig(form="image", **options)
    for options in ({}, {"image_size": 32}, {"scan": "raster"}, {"scan_patch": 48}, {"image_tiles": 64})
  ]
  assert len({open_path(str(tmp_path), data).fingerprint for data in kinds}) == len(kinds)


def grey16():
  return (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)


def png(head_end=b"\x08\2\0\0\0", rows=None, before=(), parts=1, cut=0):
  """A PNG of 32 x 32 pixels made by hand: end of its head, chunks before the pixels, parts and missing end of these."""
  rows = b"".join(b"\0" + row.tobytes() for row in random_image(32, 32)) if rows is None else rows
  packed = zlib.compress(rows)[: -cut or None]
  step = -(-len(packed) // parts)
  pixels = [(b"IDAT", packed[i : i + step]) for i in range(0, len(packed), step)]
  chunks = [(b"IHDR", struct.pack(">II", 32, 32) + head_end), *before, *pixels, (b"IEND", b"")]
  made = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
  return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def rgb16_png():
  """Pillow writes none."""
  return png(b"\x10\2\0\0\0", rows=b"".join(b"\0" + bytes(32 * 6) for _ in range(32)))


ODD = {
  "alpha": lambda: encode(np.full((32, 32, 4), 7, np.uint8)),
  "grey": lambda: encode(np.full((32, 32), 7, np.uint8), "JPEG"),
  "16 bits": lambda: encode(grey16()),
  "16 bits a channel": rgb16_png,
  "CMYK": lambda: encode(np.full((32, 32, 4), 7, np.uint8), "JPEG", "CMYK"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ODD)
def test_odd_images_are_named_skipped_or_converted(tmp_path, what):
  (tmp_path / "odd.png").write_bytes(ODD[what]())
  (tmp_path / "plain.png").write_bytes(encode(random_image(32, 32)))
  with pytest.raises(DataError, match=rf"odd\.png is .*{what}.*skip_bad.*convert_images"):
    open_path(str(tmp_path), SMALL).read(0, 0, 3072)
  skipping = open_path(str(tmp_path), DataConfig(form="image", image_size=32, skip_bad=True))
  assert skipping.names == ["plain.png"] and skipping.skipped == 1
  converting = open_path(str(tmp_path), DataConfig(form="image", image_size=32, convert_images=True, scan="raster"))
  image = converting.read(0, 0, 3072).reshape(32, 32, 3)
  if what == "16 bits":
    np.testing.assert_array_equal(image, np.repeat((grey16() >> 8).astype(np.uint8)[..., None], 3, -1))
  if what == "alpha":
    assert (image == 7).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_and_damaged_images_are_named(tmp_path, kind):
  whole = encode(random_image(64, 64), kind)
  path = tmp_path / "cut.png"
  for cut in (0, 10, len(whole) // 2, len(whole) - (20 if kind == "PNG" else 40)):
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=rf"{tmp_path}/cut\.png (is empty|is not a whole .*\)); remove it, or skip"):
      open_path(str(tmp_path), SMALL).read(0, 0, 3072)


def test_a_flipped_byte_in_a_png_is_found(tmp_path):
  whole = bytearray(encode(random_image(64, 64)))
  whole[len(whole) // 2] ^= 1
  with pytest.raises(DataError, match="x is not a whole"):
    image_decoding.open_image(bytes(whole), "x")


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 9), st.booleans())
def test_pngs_are_the_pixels_that_pillow_opens(height, width, level, smooth):
  image = random_image(height, width)
  image = np.cumsum(image // 64, axis=0).astype(np.uint8) if smooth else image  # noise and ramps take other filters
  data = encode(image, compress_level=level)
  np.testing.assert_array_equal(np.asarray(image_decoding.open_image(data, "x")), image)
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


def test_pngs_of_every_make_are_read_or_named(monkeypatch):
  expected = random_image(32, 32)
  profile = (b"iCCP", b"name\0\0" + zlib.compress(b"x"))
  plain = [png(), png(parts=5), png(before=[(b"gAMA", b"\0\0\xb1\x8f"), profile])]
  text = png(before=[(b"tEXt", b"Title\0A picture")])
  for data in (*plain, text):
    np.testing.assert_array_equal(np.asarray(image_decoding.open_image(data, "x")), expected)
  bad = {
    "with alpha": png(before=[(b"tRNS", bytes(6))]),
    "truncated|not enough": png(cut=500),
    "stream contents": png(b"\x08\2\0\0\1"),  # says that it is interlaced
    "cannot identify": png(b"\x07\2\0\0\0"),
  }
  for what, data in bad.items():
    with pytest.raises(DataError, match=f"x is .*({what})"):
      image_decoding.open_image(data, "x")
  monkeypatch.setattr(Image, "open", None)
  for data in plain:  # these do without
    np.testing.assert_array_equal(np.asarray(image_decoding.open_image(data, "x")), expected)
  with pytest.raises(DataError):
    image_decoding.open_image(text, "x")


def test_no_image_at_all_is_named(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  with pytest.raises(DataError, match=r"no files in folder .*\.jpg"):
    open_path(str(tmp_path), SMALL)
  (tmp_path / "bad.png").write_text("text")
  with pytest.raises(DataError, match="none of 1 images"):
    open_path(str(tmp_path), DataConfig(form="image", skip_bad=True))


def test_an_image_removed_while_training_is_named(tmp_path):
  shutil.copy(f"{SAMPLE_FOLDER}/images/validation/flower.jpg", tmp_path)
  source = open_path(str(tmp_path), SMALL)
  (tmp_path / "flower.jpg").unlink()
  with pytest.raises(DataError, match=r"flower\.jpg cannot be read"):
    source.read(0, 0, 10)


def test_pictures_are_written(tmp_path):
  image = random_image(32, 32)
  pictures.write_document_png(tmp_path / "a.png", patch_scan.image_to_bytes(image, "patch", 12), SMALL)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
  grid = pictures.image_grid([[image, image], [image]], gap=1)
  assert grid.shape == (67, 67, 3) and (grid[34:66, 34:] == 255).all()
  np.testing.assert_array_equal(grid[34:66, 1:33], image)
