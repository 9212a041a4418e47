"""A notice says that images are scaled, and that some are enlarged: their bits per byte are another quantity."""

import dataclasses

from PIL import Image

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data.media.image_source import notice_of_scaling
from megabyte_jax.data.open_data import open_path
from megabyte_jax.evaluation import report


def test_images_that_are_scaled_are_told(tmp_path, capsys):
  data = DataConfig(form="image", image_size=32)
  for folder, sizes in (("exact", [32] * 20), ("mixed", [32, 64, 16])):
    (tmp_path / folder).mkdir()
    for i, size in enumerate(sizes):
      Image.new("RGB", (size, size)).save(tmp_path / folder / f"{i}.png")
  (tmp_path / "mixed/bad.png").write_bytes(b"no image, which is said where it is read")
  assert notice_of_scaling(open_path(str(tmp_path / "exact"), data)) == ""
  alike = "; compare bits per byte only with those of images scaled alike"
  for spec, looked_at in ((f"{tmp_path}/mixed", 3), (f"{tmp_path}/exact,{tmp_path}/mixed", 16 + 3)):
    said = f"scaled or cut to 32 x 32 pixels: 2 of {looked_at} images looked at (1 enlarged){alike}"
    assert notice_of_scaling(open_path(spec, data)) == said
    assert report.data_notices(data, open_path(spec, data)) == [said]
  tiles = dataclasses.replace(data, image_tiles=64)
  (tmp_path / "mixed/bad.png").unlink()
  assert notice_of_scaling(open_path(f"{tmp_path}/mixed", tiles)) == ""
  prepare.main(["pack", f"{tmp_path}/mixed", f"{tmp_path}/packed", "--form=image", "--image-size=32"])
  assert "notice  scaled or cut to 32 x 32 pixels: 2 of 3 images looked at (1 enlarged)" in capsys.readouterr().err
  assert notice_of_scaling(open_path(f"{tmp_path}/packed", data)) == ""
