"""Table 5: ImageNet at three resolutions, bits per byte, equal compute and data, no sliding windows.

  python train.py --config=configs/paper/table5.py:image640_megabyte --workdir=runs/table5/image640_megabyte
  python eval.py --workdir=runs/table5/image640_megabyte

The paper's numbers:

                 image64  image256  image640
  transformer    3.62     3.801     2.847
  perceiver_ar   3.55     3.373     2.345
  megabyte       3.52     3.158     2.282

MEGABYTE reads whole images: 12,288, 196,608 and 1,228,800 bytes. Spread the longest over devices
with --config.mesh.seq.
"""

from megabyte_jax.paper import rows
from megabyte_jax.paper.rows import imagenet, perceiver_ar, run, transformer

ROWS = {
  "image64_transformer": run(transformer((1536, 24), 2048), rows.image64(), batch_size=512, learning_rate=3e-4),
  "image64_perceiver_ar": run(
    perceiver_ar((1024, 16), 12_288, 1024), rows.image64(), batch_size=512, learning_rate=3e-4
  ),
  "image64_megabyte": run(
    rows.megabyte((2048, 24), (2048, 24), patch_size=12, context=12_288),
    rows.image64(),
    batch_size=256,
    learning_rate=3e-4,
  ),
  "image256_transformer": run(transformer((768, 6), 1024), imagenet(256), batch_size=1536),
  "image256_perceiver_ar": rows.image256_perceiver_ar(),
  "image256_megabyte": rows.image256_megabyte(),
  "image640_transformer": run(transformer((768, 8), 1024), imagenet(640), batch_size=4800, learning_rate=3e-4),
  "image640_perceiver_ar": run(perceiver_ar((768, 6), 4096, 1024), imagenet(640), batch_size=2048, learning_rate=3e-4),
  "image640_megabyte": run(
    rows.megabyte((768, 12), (768, 8), patch_size=192, context=1_228_800),
    imagenet(640),
    batch_size=32,
    learning_rate=3e-4,
  ),
}


def get_config(name=""):
  return rows.select(ROWS, name)
