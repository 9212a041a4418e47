"""Any row of the paper's tables, full-size, with a modern recipe (megabyte_jax/paper/recipe.py) instead of the paper's.

  python train.py --config=configs/modern.py:table2:books_megabyte --workdir=runs/modern/books_megabyte

RMSNorm without biases, SwiGLU, rotary positions at every level, QK-norm, initial values of deviation 0.02, and Muon for
the blocks' matrices. configs/small.py:table2:books_megabyte+modern is the same at about an eighth of the compute, by
that file's rule; benchmarks/comparisons.py modern_books and modern_images measure what it is worth there, change by
change.
"""

from megabyte_jax.paper import recipe
from megabyte_jax.paper.rows_by_name import config_of


def get_config(name="table2:books_megabyte"):
  row, changes = recipe.split_name(name)
  return recipe.with_changes(config_of(row), changes or recipe.MODERN).to_config_dict()
