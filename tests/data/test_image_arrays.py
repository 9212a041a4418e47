"""Images in NumPy arrays and pickles: never taken for text, and written as files by the lines of docs/data.md."""

import io
import pickle
import re
import runpy
import zipfile

import numpy as np
import pytest
from run_commands import ROOT

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data.media import patch_scan
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import DataError

HINT = "images in arrays are written as files first, as docs/data.md shows under Images in arrays"


def batch_of(images):
  """The .npz file of a batch: rows of all red bytes, then all green, then all blue ones."""
  file = io.BytesIO()
  np.savez(file, data=images.transpose(0, 3, 1, 2).reshape(len(images), -1), labels=np.arange(len(images)))
  return file.getvalue()


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


def test_arrays_are_no_texts(tmp_path, images):
  (tmp_path / "in").mkdir()
  (tmp_path / "in/a.npz").write_bytes(batch_of(images))
  (tmp_path / "in/b.txt").write_bytes(b"words")
  for spec in ("in", "in/a.npz"):
    with pytest.raises(
      DataError, match=rf"a\.npz holds arrays, not text; {HINT}; or take .*--raw\), or leave .*skip-bad"
    ):
      prepare.main(["pack", str(tmp_path / spec), str(tmp_path / "out")])
  assert open_path(str(tmp_path / "in"), DataConfig(skip_bad=True)).names == ["b.txt"]
  assert open_path(str(tmp_path / "in"), DataConfig(raw=True)).names == ["a.npz", "b.txt"]
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
    archive.writestr("train/a.npz", batch_of(images))
    archive.writestr("b.txt", b"words")
  with pytest.raises(DataError, match=rf"train/a\.npz in .*x\.zip holds arrays, not text; unpack it: {HINT}; skip"):
    prepare.main(["pack", str(tmp_path / "x.zip"), str(tmp_path / "out")])
  prepare.main(["pack", str(tmp_path / "x.zip"), str(tmp_path / "out"), "--skip-bad"])
  packed = open_path(str(tmp_path / "out"), DataConfig())
  assert list(packed.names) == ["b.txt"] and packed.skipped == 1


@pytest.mark.parametrize("kind", ["a zip or .npz file", "a pickle"])
def test_arrays_are_no_image_files(tmp_path, images, kind):
  path = tmp_path / "batch"
  path.write_bytes(batch_of(images) if "npz" in kind else pickle.dumps({"data": images}))
  source = open_path(str(path), DataConfig(form="image"))
  with pytest.raises(DataError, match=rf"batch is {kind}, not an image; {HINT}; remove"):
    source.read(0, 0, 1)


@pytest.mark.parametrize("name", ["val_data.npz", "val_data"])
def test_the_lines_of_the_document_write_the_images(tmp_path, images, monkeypatch, name):
  folder = tmp_path / "Imagenet64_val_npz"
  folder.mkdir()
  rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  (folder / name).write_bytes(batch_of(images) if "npz" in name else pickle.dumps({"data": rows, "labels": [1, 2, 3]}))
  section = (ROOT / "docs/data.md").read_text().partition("## Images in arrays\n")[2].partition("\n## ")[0]
  (tmp_path / "lines.py").write_text(re.search(r"```python\n(.*?)```", section, re.S)[1])
  monkeypatch.chdir(tmp_path)
  runpy.run_path("lines.py")
  source = open_path("data/imagenet64_box/validation", DataConfig(form="image", image_size=64))
  assert list(source.names) == [f"val_data_{i:06}.png" for i in range(3)]
  for i, image in enumerate(images):
    np.testing.assert_array_equal(patch_scan.bytes_to_image(source.read(i, 0, 64 * 64 * 3), "patch", 12), image)
