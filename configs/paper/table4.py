"""Table 4: ImageNet 64x64, 3.40 bits per byte after 1.4 trillion bytes (2.7B global, 350M local).

  python train.py --config=configs/paper/table4.py:megabyte --workdir=runs/table4/megabyte
  python eval.py --workdir=runs/table4/megabyte --method=both

Table 15 prints a batch of 2, which would make 57 million updates; 256 is that of its other Image64 row.
"""

from megabyte_jax import paper_rows

ROWS = {
  "megabyte": paper_rows.run(
    paper_rows.megabyte((2560, 32), (1024, 24), patch_size=12, context=12_288),
    paper_rows.image64(),
    batch_size=256,
    train_bytes=paper_rows.IMAGENET64_BYTES,
    method="both",
  ),
}


def get_config(name=""):
  return paper_rows.select(ROWS, name)
