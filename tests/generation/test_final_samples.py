import numpy as np
import pytest
from PIL import Image

from megabyte_jax.config import Config, DataConfig, Level, MegabyteConfig
from megabyte_jax.data.media import patch_scan
from megabyte_jax.data.open_data import open_source
from megabyte_jax.generation.final_samples import whole_letters, write_samples
from megabyte_jax.parallel.sharding import make_mesh
from megabyte_jax.training.state import initial_state


def config(data, **options):
  levels = (
    Level(patch_size=12, width=24, num_layers=1, num_heads=2),
    Level(patch_size=1, width=8, num_layers=1, num_heads=2),
  )
  model = MegabyteConfig(context=192, levels=levels, init_std=0.02)
  return Config(model=model, data=data, batch_size=8, num_steps=1, **options)


def parameters(config):
  return initial_state(config, make_mesh(config.mesh)).parameters


@pytest.mark.slow
def test_a_grid_of_real_completed_and_sampled_images(tmp_path):
  data = DataConfig(
    train="sample:images/train", validation="sample:images/validation", form="image", image_size=8, image_tiles=32
  )
  made = config(data, sample_bytes=2 * 192)
  source = open_source(data, "validation")
  [path] = write_samples(made, parameters(made), source, str(tmp_path))
  grid = np.asarray(Image.open(path))
  assert grid.shape == (3 * 10 + 2, 2 * 10 + 2, 3)
  first = patch_scan.bytes_to_image(source.read(0, 0, 192), "patch", 12)
  np.testing.assert_array_equal(grid[2:10, 2:10], first)
  np.testing.assert_array_equal(grid[12:16, 2:10], first[:4])  # the upper half is given
  assert (grid[16:20, 2:10] != first[4:]).any() and (grid[22:30, 2:10] != first).any()
  assert write_samples(config(data), None, source, str(tmp_path)) == []
  assert write_samples(config(DataConfig(), sample_bytes=9), None, source, str(tmp_path)) == []


def test_recordings_real_completed_and_sampled(tmp_path):
  soundfile = pytest.importorskip("soundfile")
  data = DataConfig(
    train="sample:audio/train", validation="sample:audio/validation", form="audio", sample_rate=4000, encoding="pcm16"
  )
  made = config(data, sample_bytes=402)
  paths = write_samples(made, parameters(made), open_source(data, "validation"), str(tmp_path))
  sounds = {path.rsplit("/", 1)[-1]: soundfile.read(path, dtype="int16")[0] for path in paths}
  assert list(sounds) == ["real.wav", "completed.wav", "sampled.wav"] and {len(x) for x in sounds.values()} == {200}
  np.testing.assert_array_equal(sounds["real.wav"][:100], sounds["completed.wav"][:100])
  assert (sounds["real.wav"] != sounds["completed.wav"]).any()


def test_a_letter_cut_off_at_the_end_is_left_out():
  euro = "a€".encode()
  assert [whole_letters(euro[:size]) for size in range(5)] == [b"", b"a", b"a", b"a", euro]
  assert whole_letters(b"caf\xe9 au lait") == b"caf\xe9 au lait"  # Latin-1
