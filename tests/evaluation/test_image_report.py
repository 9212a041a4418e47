import numpy as np
import pytest
from PIL import Image

from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.evaluation.image_report import summarize, write_best_and_worst


def test_mean_and_standard_error_over_images():
  bpb = np.array([3.0, 1.0, 2.0, 4.0])
  lengths = np.full(5, 12)
  scored = np.array([12, 12, 12, 12, 5])
  summary = summarize(np.append(bpb * 12 * np.log(2), 1.0), scored, lengths)
  assert summary.images == 4 and summary.mean_bpb == pytest.approx(2.5)
  assert summary.standard_error == pytest.approx(np.sqrt(5 / 3) / 2)
  assert summary.ranked.tolist() == [1, 2, 0, 3] and summary.bpb == pytest.approx([1, 2, 3, 4])
  assert str(summary).startswith("2.5000 bpb +- 0.6455")
  assert summarize(np.ones(1), np.ones(1), np.ones(1)).standard_error is None
  with pytest.raises(ValueError, match="as a whole"):
    summarize(np.ones(2), np.ones(2), np.full(2, 12))


def test_tiles_count_for_the_standard_error_as_the_images_that_they_are_of():
  bpb = np.array([3.0, 1.0, 2.0, 4.0])
  lengths = np.full(4, 12)

  def summary(*tiles):
    return summarize(bpb * 12 * np.log(2), lengths, lengths, tiles)

  apart = summary("a[0,0]", "b[0,0]", "c[0,0]", "d[0,0]")
  together = summary("a[0,0]", "b[0,0]", "b[0,1]", "a[1,0]")
  assert apart.standard_error == pytest.approx(np.sqrt(5 / 3) / 2)
  assert together.standard_error == pytest.approx(np.array([3.5, 1.5]).std(ddof=1) / np.sqrt(2))
  assert (together.images, together.tiles, together.mean_bpb) == (2, 4, apart.mean_bpb)
  assert str(together).endswith("over 4 tiles of 2 images")
  assert summary(*(f"a[{i},0]" for i in range(4))).standard_error is None


def test_best_and_worst_are_the_pictures_themselves(tmp_path):
  data = DataConfig(form="image", image_size=16, scan_patch=48, image_tiles=48)
  source = open_path("sample:images/validation", data)
  count = len(source.names)
  nats = np.arange(count)[::-1].astype(float)
  summary = summarize(nats, source.lengths, source.lengths)
  best, worst = (np.asarray(Image.open(p)) for p in write_best_and_worst(summary, source, data, tmp_path, count=3))
  assert best.shape == worst.shape == (20, 56, 3)
  from_source = source.read(count - 1, 0, 768)
  patches = from_source.reshape(4, 4, 4, 4, 3)  # of 4 x 4 pixels, in rows
  np.testing.assert_array_equal(best[2:6, 2:6], patches[0, 0])
  np.testing.assert_array_equal(best[14:18, 14:18], patches[3, 3])
  np.testing.assert_array_equal(worst[2:6, 2:6], source.read(0, 0, 48).reshape(4, 4, 3))
