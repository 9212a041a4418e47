"""Table 11: ways to evaluate one model (1.3B global, 350M local, PG-19, 400 billion bytes), bits per byte on test.

  python train.py --config=configs/paper/table11.py:basic --workdir=runs/table11
  python eval.py --workdir=runs/table11 --split=test --method=both      # and basic, sliding, strided

The paper's numbers: basic (1x the compute) 0.9079, sliding (2x) 0.8918, strided (2x) 0.8926, both (4x) 0.8751.
The rows differ in --config.eval.method alone: train once, evaluate four times.
"""

from megabyte_jax.paper import rows

MODEL = rows.text_megabyte("pg19", (2048, 24), (1024, 24), train_bytes=rows.LONG_BYTES)

ROWS = {method: rows.with_method(MODEL, method) for method in ("basic", "sliding", "strided", "both")}


def get_config(name=""):
  return rows.select(ROWS, name)
