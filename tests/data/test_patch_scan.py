import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.config import DataConfig
from megabyte_jax.data.media import patch_scan
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import ConfigError, DataError

PATCHES = (12, 48, 192, 768)


def random_image(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def patch_scan_by_hand(image, p):
  """Every byte looked up one by one: patches in rows, pixels of a patch in rows, colours of a pixel."""
  height, width, _ = image.shape
  return [
    image[top + i, left + j, c]
    for top in range(0, height, p)
    for left in range(0, width, p)
    for i in range(p)
    for j in range(p)
    for c in range(3)
  ]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(PATCHES), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_patch_scan_keeps_patches_together(scan_patch, rows, columns, seed):
  p = patch_scan.patch_side(scan_patch)
  image = random_image(rows * p, columns * p, seed)
  x = patch_scan.image_to_bytes(image, "patch", scan_patch)
  assert sorted(x) == sorted(image.reshape(-1))
  x_patches = x.reshape(rows, columns, scan_patch)  # a patch of the model is a square of the image
  np.testing.assert_array_equal(x_patches[-1, 0].reshape(p, p, 3), image[-p:, :p])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(PATCHES), st.integers(1, 5), st.sampled_from(("patch", "raster")), st.integers(0, 99))
def test_scans_are_exactly_inverted(scan_patch, patches, scan, seed):
  side = patches * patch_scan.patch_side(scan_patch)
  image = random_image(side, side, seed)
  x = patch_scan.image_to_bytes(image, scan, scan_patch)
  np.testing.assert_array_equal(patch_scan.bytes_to_image(x, scan, scan_patch), image)


@pytest.mark.parametrize("scan_patch", PATCHES)
def test_patch_scan_against_a_transcription(scan_patch):
  image = random_image(32, 48)
  p = patch_scan.patch_side(scan_patch)
  np.testing.assert_array_equal(patch_scan.image_to_bytes(image, "patch", scan_patch), patch_scan_by_hand(image, p))


@given(st.integers(1, 9), st.integers(1, 9))
def test_raster_scan_is_the_image_as_it_lies(height, width):
  image = random_image(height, width)
  assert patch_scan.image_to_bytes(image, "raster").tobytes() == image.tobytes()


def test_patches_that_do_not_fit_are_named():
  for bad in (0, -3, 8, 13, 24):
    with pytest.raises(ConfigError, match=f"scan_patch is {bad}"):
      patch_scan.patch_side(bad)
  with pytest.raises(ConfigError, match="do not tile"):
    patch_scan.image_to_bytes(random_image(6, 6), "patch", 48)
  with pytest.raises(ConfigError, match="image_size 66"):
    open_path("sample:images/train", DataConfig(form="image", image_size=66, scan_patch=48))
  with pytest.raises(DataError, match="no 2 x 2 image"):
    patch_scan.bytes_to_image(np.zeros(13, np.uint8), "raster")
