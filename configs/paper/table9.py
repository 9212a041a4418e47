"""Table 9: speed of generating 8,192 bytes, two models trained on PG-19 with equal compute.

  python train.py --config=configs/paper/table9.py:megabyte --workdir=runs/table9/megabyte
  python -m megabyte_jax generate --workdir=runs/table9/megabyte --bytes=8192

The paper's numbers (device not named): transformer 1.064 bpb, 132 s; megabyte 0.991 bpb, 93 s.
"""

from megabyte_jax.paper import rows
from megabyte_jax.paper.rows import run, text, transformer

ROWS = {
  "transformer": run(transformer((1024, 24), 1024), text("pg19"), batch_size=72),
  "megabyte": rows.text_megabyte("pg19", (2048, 24), (1024, 15)),
}


def get_config(name=""):
  return rows.select(ROWS, name)
