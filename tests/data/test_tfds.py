import importlib.util
import io
import pathlib
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tfds_copies
from PIL import Image

from megabyte_jax.commands.prepare import parse_arguments
from megabyte_jax.config import DataConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.media import patch_scan
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_path, open_source
from megabyte_jax.data.tfds_source import Texts, parse_spec
from megabyte_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  for make in (
    tfds_copies.downsampled_imagenet,
    tfds_copies.imagenet_resized,
    tfds_copies.imagenet2012,
    tfds_copies.pg19,
  ):
    make(root)
  return root


def options(root, **more):
  return DataConfig(tfds_dir=str(root), **more)


def test_names_are_taken_apart():
  assert parse_spec("tfds:imagenet2012:5.1.0:validation") == ("imagenet2012:5.1.0", "validation", "")
  assert parse_spec("tfds:gs://bucket/a/1.0.0:train[:90%]+test#text") == (
    "gs://bucket/a/1.0.0",
    "train[:90%]+test",
    "text",
  )
  for bad in ("tfds:pg19", "tfds:a/b:1.0.0", "tfds::"):
    with pytest.raises(ConfigError, match="names no split"):
      parse_spec(bad)


@pytest.mark.parametrize("name", ["downsampled_imagenet", "imagenet_resized"])
def test_images_of_64_pixels_come_back_exactly(root, name):
  data = options(root, form="image", image_size=64)
  source = open_path(f"tfds:{name}/64x64:validation", data)
  found = {patch_scan.bytes_to_image(source.read(i, 0, 12288), "patch", 12).tobytes() for i in range(len(source.names))}
  photos = tfds_copies.PHOTOS[7:] if name == "downsampled_imagenet" else tfds_copies.PHOTOS[:3]
  expected = {np.asarray(Image.open(io.BytesIO(tfds_copies.tile_png(p)))).tobytes() for p in photos}
  assert found == expected and (source.lengths == 64 * 64 * 3).all()


@pytest.mark.parametrize("size", [256, 640])
def test_imagenet_is_scaled_and_cropped_as_a_folder_is(root, tmp_path, size):
  for photo in tfds_copies.PHOTOS[7:]:
    (tmp_path / photo.name).write_bytes(tfds_copies.jpeg(photo))
  data = options(root, form="image", image_size=size, scan_patch=192)
  n = size * size * 3
  ours, folder = open_path("tfds:imagenet2012:validation", data), open_path(str(tmp_path), data)
  assert {ours.read(i, 0, n).tobytes() for i in range(4)} == {folder.read(i, 0, n).tobytes() for i in range(4)}


def test_a_folder_of_a_data_set_is_a_name_too(root):
  data = options(root, form="image")
  named = open_path("tfds:downsampled_imagenet/64x64:train[:3]", data)
  placed = open_path(f"tfds:{root}/downsampled_imagenet/64x64/2.0.0:train[:3]", DataConfig(form="image"))
  assert len(named.names) == 3 and named.fingerprint == placed.fingerprint
  np.testing.assert_array_equal(named.read(2, 0, 100), placed.read(2, 0, 100))
  assert open_path("tfds:downsampled_imagenet/64x64:train[1:4]", data).fingerprint != named.fingerprint


def test_books_are_whole(root):
  data = options(root, train="tfds:pg19:train", validation="tfds:pg19:validation")
  text = pathlib.Path(SAMPLE_FOLDER, "text/train/moby_dick.txt").read_text()
  source = open_source(data, "validation")
  assert source.read(0, 0, int(source.lengths[0])).tobytes().decode() == text[60_000:150_000]
  train = open_source(data, "train")
  assert sorted(train.lengths) == sorted(len(t.encode()) for t in (text[:40_000], text[40_000:40_700]))
  for _, batch in batches(train, batch_size=2, context=512, seed=0, num_steps=3, documents="whole"):
    assert all(row[:n].tobytes().decode() in text for row, n in zip(batch.x_BT, batch.length_B, strict=True))
  assert open_path("tfds:pg19:train#book_title", data).read(0, 0, 4).tobytes() == b"Book"


def test_tensorflow_is_not_imported(root):
  code = f"""
import sys
from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
assert not [name for name in sys.modules if name.startswith('tensorflow')]
source = open_path('tfds:downsampled_imagenet/64x64:validation', DataConfig(form='image', tfds_dir={str(root)!r}))
assert source.read(0, 0, 12288).size == 12288
assert 'tensorflow' not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_missing_data_give_the_command_that_prepares_them(root, tmp_path):
  with pytest.raises(DataError) as error:
    open_path("tfds:imagenet2012:validation", options(tmp_path, form="image"))
  assert (
    f"python -m megabyte_jax prepare build tfds:imagenet2012 --tfds-dir={tmp_path}\n"
    in f"{error.value}\n".replace(" (", "\n(")
  )
  assert "fetched by hand" in str(error.value)
  with pytest.raises(DataError, match=r"no data set 'imagnet2012'.*imagenet2012"):
    open_path("tfds:imagnet2012:validation", options(root, form="image"))
  with pytest.raises(DataError, match="no such split; there are train, validation"):
    open_path("tfds:pg19:valid", options(root))
  with pytest.raises(DataError, match=r"no dataset_info\.json"):
    open_path(f"tfds:{tmp_path}/nothing:train", options(root))
  with pytest.raises(ConfigError, match=r"add #FEATURE"):
    open_path("tfds:downsampled_imagenet/64x64:train", options(root))
  with pytest.raises(ConfigError, match=r"no bytes feature 'book'"):
    open_path("tfds:pg19:train#book", options(root))
  with pytest.raises(ConfigError, match="audio"):
    open_path("tfds:pg19:train", options(root, form="audio"))


def test_texts_that_are_skipped_are_named():
  texts = {"a": b"text", "b": b"", "c": b"more"}
  records = types.SimpleNamespace(spec="tfds:a:b", names=list(texts), load=lambda i: texts["abc"[i]])
  source = Texts(records, DataConfig(skip_bad=True))
  assert (source.names, source.skipped, source.skipped_names) == (["a", "c"], 1, ["b"])


def test_many_texts_come_with_the_command_that_packs_them(caplog):
  spec = "tfds:pg19:train[:90%]"
  records = types.SimpleNamespace(spec=spec, names=[f"{i}" for i in range(1001)], load=lambda i: b"text")
  assert Texts(records, DataConfig(tfds_dir="/my data", skip_bad=True)).lengths.sum() == 4004
  command = f"python -m megabyte_jax prepare pack '{spec}' FOLDER --tfds-dir='/my data' --skip-bad"
  assert caplog.messages == [
    f"reading {spec} once to learn the lengths of its 1001 texts; pack it to start at once: {command}"
  ]
  arguments = vars(parse_arguments(shlex.split(command)[4:]))
  assert (arguments["source"], arguments["tfds_dir"], arguments["skip_bad"]) == (spec, "/my data", True)


@pytest.mark.parametrize("part", ["[:0]", "[5:2]"])
def test_a_part_without_records_is_named(root, part):
  with pytest.raises(DataError, match=r"train\[.*\] names no records"):
    open_path(f"tfds:downsampled_imagenet/64x64:train{part}", options(root, form="image"))


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="its builder can then be imported")
def test_a_data_set_whose_builder_needs_tensorflow_is_read_where_it_is_prepared(root, tmp_path):
  with pytest.raises(DataError, match=r"coco/2017 is not in .*needs TensorFlow.*\n.*prepare build tfds:coco/2017"):
    open_path("tfds:coco/2017:validation", options(tmp_path, form="image"))
  copy = tmp_path / "coco" / "2017" / "1.1.0"
  shutil.copytree(root / "downsampled_imagenet" / "64x64" / "2.0.0", copy)
  for path in copy.iterdir():
    path.rename(copy / path.name.replace("downsampled_imagenet", "coco"))
  info = (copy / "dataset_info.json").read_text()
  info = info.replace("downsampled_imagenet", "coco").replace("64x64", "2017").replace("2.0.0", "1.1.0")
  (copy / "dataset_info.json").write_text(info)
  source = open_path("tfds:coco/2017:validation", options(tmp_path, form="image"))
  original = open_path("tfds:downsampled_imagenet/64x64:validation", options(root, form="image"))
  np.testing.assert_array_equal(source.read(1, 0, 12288), original.read(1, 0, 12288))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.99])
def test_a_truncated_shard_is_named(root, tmp_path, keep):
  copy = tmp_path / "downsampled_imagenet"
  shutil.copytree(root / "downsampled_imagenet", copy)
  [shard] = copy.glob("*/*/*validation*")
  whole = shard.read_bytes()
  before = open_path("tfds:downsampled_imagenet/64x64:validation", options(root, form="image")).fingerprint
  shard.write_bytes(whole[: int(len(whole) * keep)])
  with pytest.raises(DataError, match=r"validation\[\d\] \(record \d of .*validation.array_record.*\) cannot be read"):
    source = open_path("tfds:downsampled_imagenet/64x64:validation", options(tmp_path, form="image"))
    assert source.fingerprint != before
    for i in range(4):
      source.read(i, 0, 12288)
  shard.unlink()
  with pytest.raises(DataError, match="cannot be read"):
    open_path("tfds:downsampled_imagenet/64x64:validation", options(tmp_path, form="image")).read(0, 0, 1)
