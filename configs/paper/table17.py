"""Table 17: a longer context on PG-19 (1.3B global, 350M local, P = 8), bits per byte on test.

  python train.py --config=configs/paper/table17.py:context16384 --workdir=runs/table17/context16384
  python eval.py --workdir=runs/table17/context16384 --split=test --method=both

The paper's numbers: context8192 0.8751, context16384 0.8787. Both have batches of the same number of bytes.
"""

from megabyte_jax.paper import rows

ROWS = {
  f"context{context}": rows.text_megabyte(
    "pg19", (2048, 24), (1024, 24), context=context, train_bytes=rows.LONG_BYTES, method="both"
  )
  for context in (8192, 16_384)
}


def get_config(name=""):
  return rows.select(ROWS, name)
