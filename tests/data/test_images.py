import dataclasses
import io
import shutil
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

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


def test_photographs_are_decoded_once_for_all_their_tiles(tmp_path, monkeypatch):
  for i in range(20):
    (tmp_path / f"{i:02}.png").write_bytes(encode(random_image(64, 64, i)))
  source = open_path(str(tmp_path), DataConfig(form="image", image_size=32, image_tiles=64, scan="raster"))
  decoded, open_image = [], image_decoding.open_image
  monkeypatch.setattr(image_decoding, "open_image", lambda *given: decoded.append(given[1]) or open_image(*given))
  for tile in np.random.default_rng(0).permutation(len(source.lengths)):
    source.read(int(tile), 0, 3072)
  assert len(source.lengths) == 80 and len(decoded) == 20


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
    with pytest.raises(DataError, match=rf"{tmp_path}/cut\.png (is empty|is not a whole .*\)); remove it .*, or skip"):
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


def frames(kind, count):
  """Several pictures in one file."""
  first, *others = (Image.fromarray(random_image(32, 32, i)) for i in range(count))
  file = io.BytesIO()
  first.save(file, format=kind, save_all=True, append_images=others)
  return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "AVIF", "JPEG", "MPO"])
@pytest.mark.parametrize("ending", ["", ".jpg"])
def test_images_of_all_common_kinds_are_read(tmp_path, kind, ending):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow reads no AVIF")
  data, ending = encode(random_image(32, 32), kind), ending or {"JPEG": ".jfif", "TIFF": ".tif"}.get(kind, f".{kind}")
  (tmp_path / f"a{ending}").write_bytes(data)
  source = open_path(str(tmp_path), SMALL)
  expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  np.testing.assert_array_equal(patch_scan.bytes_to_image(source.read(0, 0, 3072), "patch", 12), expected)
  (tmp_path / f"a{ending}").write_bytes(data[: len(data) // 2])
  with pytest.raises(DataError, match=r"a\..* is not a whole"):
    open_path(str(tmp_path), SMALL).read(0, 0, 3072)


def test_a_photograph_with_further_pictures_behind_it_gives_the_first(tmp_path):
  data = frames("MPO", 2)
  assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
  for whole in (data, data[:-50]):  # also where one of those is cut short
    (tmp_path / "drone.jpg").write_bytes(whole)
    found = open_path(str(tmp_path), SMALL).read(0, 0, 3072)
    first = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(patch_scan.bytes_to_image(found, "patch", 12), first)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
@pytest.mark.parametrize("convert", [False, True])
def test_animations_and_pages_are_named_and_never_one_image(tmp_path, kind, convert):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow reads no AVIF")
  (tmp_path / f"a.{kind}").write_bytes(frames(kind, 2))
  data = DataConfig(form="image", image_size=32, convert_images=convert)
  with pytest.raises(
    DataError, match=r"a\..* is (an animation|a file of several pages), not an 8-bit RGB image; remove"
  ):
    open_path(str(tmp_path), data).read(0, 0, 3072)
  (tmp_path / f"a.{kind}").write_bytes(frames(kind, 1))
  assert open_path(str(tmp_path), data).read(0, 0, 3072).size == 3072


def tiff(directories):
  """A TIFF of one grey-free pixel for each of the given (kind of page, bits a channel)."""
  data, place = b"II*\0", 8
  out = struct.pack("<I", place)
  for number, (kind, bits) in enumerate(directories):
    tags = [(254, 4, 1, kind), (256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 3, place + 138), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, place + 144), (277, 3, 1, 3), (278, 4, 1, 1), (279, 4, 1, 3 * bits // 8), (284, 3, 1, 1)]
    directory = struct.pack("<H", 11) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    after = place + 160 if number + 1 < len(directories) else 0
    out += directory + struct.pack("<I", after) + struct.pack("<3H", *[bits] * 3) + bytes(range(7, 19)) + bytes(4)
    place += 160
  return data + out


@pytest.mark.parametrize(
  ("pages", "what"),
  [([(0, 8)], ""), ([(0, 8), (1, 8)], ""), ([(0, 8), (0, 8)], "several pages"), ([(0, 16)], "16 bits a channel")],
)
def test_pages_of_a_tiff_count_unless_they_are_smaller_copies(pages, what):
  data = tiff(pages)
  if what:
    with pytest.raises(DataError, match=what):
      image_decoding.open_image(data, "x")
  else:
    assert np.asarray(image_decoding.open_image(data, "x")).tolist() == [[[7, 8, 9]]]


def test_large_images_are_refused_by_number_of_pixels_or_read_where_that_is_asked_for(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses twice as many
  (tmp_path / "map.png").write_bytes(encode(random_image(60, 40), "TIFF"))
  for tiles in (0, 64):
    data = DataConfig(form="image", image_size=32, image_tiles=tiles, max_pixels=2399)
    line = r"map\.png is too large: .*2,400 pixels are more than .*max_pixels=2399.*--max-pixels.*skip_bad|60 pixels"
    with pytest.raises(DataError, match=line):
      open_path(str(tmp_path), data).read(0, 0, 3072)
    assert open_path(str(tmp_path), dataclasses.replace(data, max_pixels=2400)).read(0, 0, 3072).size == 3072
  with pytest.raises(DataError, match="none of 1 images"):
    open_path(str(tmp_path), DataConfig(form="image", image_size=32, max_pixels=2399, skip_bad=True))
  (tmp_path / "map.png").write_bytes(encode(random_image(60, 40)))  # by the other decoder
  with pytest.raises(DataError, match="40 x 60 pixels are more than"):
    open_path(str(tmp_path), DataConfig(form="image", image_size=32, max_pixels=2399)).read(0, 0, 3072)
  with pytest.raises(ConfigError, match=r"data\.max_pixels is 0"):
    DataConfig(max_pixels=0)


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


def test_a_thin_image_is_not_scaled_to_more_pixels_than_allowed(tmp_path, monkeypatch):
  monkeypatch.setattr(image_decoding, "MAX_PIXELS", 1000)
  for name, shape in {"a.png": (32, 32), "thin.png": (1, 400)}.items():
    (tmp_path / name).write_bytes(encode(random_image(*shape)))
  data = DataConfig(form="image", image_size=32, image_tiles=32, max_pixels=400 * 32 * 32 - 1)
  with pytest.raises(DataError, match=r"thin\.png is too large: .*12,800 x 32 pixels, more than .*fewer image_tiles"):
    open_path(str(tmp_path), data)
  source = open_path(str(tmp_path), dataclasses.replace(data, skip_bad=True))
  assert source.names == ["a.png[0,0]"] and source.skipped == 1
  assert len(open_path(str(tmp_path), dataclasses.replace(data, max_pixels=400 * 32 * 32)).names) == 401


def test_an_image_without_its_palette_is_not_taken_for_a_grey_one():
  data = encode(np.zeros((4, 4), np.uint8), mode="P")
  image_decoding.open_image(data, "x")
  place = data.index(b"PLTE") - 4
  stop = place + 12 + int.from_bytes(data[place : place + 4], "big")
  with pytest.raises(DataError, match="its palette is missing"):
    image_decoding.open_image(data[:place] + data[stop:], "x")


def test_the_orientation_in_exif_is_not_applied():
  image = random_image(2, 3)
  turned = Image.Exif()
  turned[0x0112] = 6  # a quarter turn
  with io.BytesIO() as out:
    Image.fromarray(image).save(out, "PNG", exif=turned)
    np.testing.assert_array_equal(np.asarray(image_decoding.open_image(out.getvalue(), "x")), image)
