"""Table 4: ImageNet 64x64, 3.40 bits per byte after 1.4 trillion bytes (2.7B global, 350M local).

  python train.py --config=configs/paper/table4.py:megabyte --workdir=runs/table4/megabyte
  python eval.py --workdir=runs/table4/megabyte --method=both

Table 15 prints a batch of 2, which would make 57 million updates; 256 is that of its other Image64 row.
"""

from megabyte_jax.paper import rows

ROWS = {
  "megabyte": rows.run(
    rows.megabyte((2560, 32), (1024, 24), patch_size=12, context=12_288),
    rows.image64(),
    batch_size=256,
    train_bytes=rows.IMAGENET64_BYTES,
    method="both",
  ),
}


def get_config(name=""):
  return rows.select(ROWS, name)
