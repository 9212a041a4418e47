"""Table 2 (and 7): bits per byte on five text sets, 80 billion bytes each, equal compute.

  python train.py --config=configs/paper/table2.py:pg19_megabyte --workdir=runs/table2/pg19_megabyte
  python eval.py --workdir=runs/table2/pg19_megabyte --split=test

Names are DATA_MODEL. The paper's numbers:

                 pg19    stories  books   arxiv   code
  transformer    1.057   1.064    1.097   0.816   0.575
  perceiver_ar   1.104   1.070    1.104   0.791   0.546
  megabyte       1.000   0.978    1.007   0.678   0.411

DATA_windowed_transformer is not in the paper: the strong rival that later work found.
"""

from collections.abc import Callable

from megabyte_jax.config import Config
from megabyte_jax.paper import rows

DATA = ("pg19", "stories", "books", "arxiv", "code")

MODELS: dict[str, Callable[[str], Config]] = {
  "transformer": rows.text_transformer,
  "windowed_transformer": rows.text_windowed_transformer,
  "perceiver_ar": rows.text_perceiver_ar,
  "megabyte": rows.text_megabyte,
}

ROWS = {f"{data}_{model}": make(data) for data in DATA for model, make in MODELS.items()}


def get_config(name=""):
  return rows.select(ROWS, name)
