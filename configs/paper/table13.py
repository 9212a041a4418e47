"""Table 13: size of the global against the local model on PG-19, equal compute and data, bits per byte.

  python train.py --config=configs/paper/table13.py:global1300m_local218m --workdir=runs/table13/global1300m_local218m
  python eval.py --workdir=runs/table13/global1300m_local218m

The paper's numbers: global350m_local290m 1.014, global760m_local262m 1.002, global1300m_local218m 0.991.
"""

from megabyte_jax.paper import rows

ROWS = {
  "global350m_local290m": rows.text_megabyte("pg19", (1024, 24), (1024, 20)),
  "global760m_local262m": rows.text_megabyte("pg19", (1536, 24), (1024, 18)),
  "global1300m_local218m": rows.text_megabyte("pg19", (2048, 24), (1024, 15)),
}


def get_config(name=""):
  return rows.select(ROWS, name)
