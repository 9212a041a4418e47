"""Small copies of real TFDS data sets: their own names and features, the shipped samples as contents."""

import io
import pathlib
import types

import tensorflow_datasets as tfds
from PIL import Image

from megabyte_jax.data.open_data import SAMPLE_FOLDER

PHOTOS = sorted(pathlib.Path(SAMPLE_FOLDER).glob("images/*/*.jpg"))


def tile_png(photo, size=64):
  """The middle of a photograph as the bytes of a PNG, as downsampled_imagenet stores them."""
  with Image.open(photo) as image:
    left, top = image.width // 2, image.height // 2
    tile = image.crop((left, top, left + size, top + size))
  file = io.BytesIO()
  tile.save(file, format="PNG")
  return file.getvalue()


def jpeg(photo, short_side=120):
  with Image.open(photo) as image:
    image.thumbnail((2 * short_side, short_side))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95)
  return file.getvalue()


def build(name, root, splits):
  """Writes ArrayRecord files below `root`; splits: {split: list of examples}."""
  builder = tfds.builder(name, data_dir=root, file_format="array_record")
  builder._split_generators = lambda *_: {k: list(enumerate(v)) for k, v in splits.items()}
  builder._make_download_manager = lambda **_: types.SimpleNamespace(downloaded_size=0)  # nothing is fetched
  builder.download_and_prepare()
  return builder


def downsampled_imagenet(root):
  tiles = [{"image": io.BytesIO(tile_png(photo))} for photo in PHOTOS]
  return build("downsampled_imagenet/64x64", root, {"train": tiles[:7], "validation": tiles[7:]})


def imagenet_resized(root):
  tiles = [{"image": io.BytesIO(tile_png(photo)), "label": 3} for photo in PHOTOS[:3]]
  return build("imagenet_resized/64x64", root, {"validation": tiles})


def imagenet2012(root):
  photos = [{"image": io.BytesIO(jpeg(p)), "file_name": p.name, "label": i} for i, p in enumerate(PHOTOS)]
  return build("imagenet2012", root, {"train": photos[:7], "validation": photos[7:]})


def pg19(root):
  text = pathlib.Path(SAMPLE_FOLDER, "text/train/moby_dick.txt").read_text()
  books = [
    {
      "book_text": text[start : start + size],
      "book_id": start,
      "book_title": f"Book {start}",
      "publication_date": "1851",
      "book_link": "https://example.org",
    }
    for start, size in ((0, 40_000), (40_000, 700), (60_000, 90_000))
  ]
  return build("pg19", root, {"train": books[:2], "validation": books[2:]})
