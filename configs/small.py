"""Any row of the paper's tables at about an eighth of its compute per byte, for one GPU and a hundred megabytes.

  python train.py --config=configs/small.py:table2:books_megabyte --workdir=runs/small/books_megabyte \
    --config.data.train=corpora/books/train --config.data.validation=corpora/books/validation

One rule for every row:

- Half the width and half the layers of every level, heads as wide as they were; context, patch size, latents,
  extensions and inference method stay.
- All rows of a data set predict equally many bytes a step, as in the paper's comparisons, so that they are updated
  equally often: 32,768, or whole images that come closest to it. A batch of many windows is worked through in parts of
  at most 65,536 bytes.
- 134 million bytes in all, a twenty-fifth of the steps to warm up. The learning rate is the paper's for the full size:
  try others.
- Parameters are drawn with a deviation of 0.04, about width^-0.5, not 0.006: with that a short run stays on its first
  plateau, where bytes are predicted from the one before, for hundreds of steps. When it leaves it then decides more
  than the model does.

benchmarks/comparisons.py runs whole tables of these. `ROW+modern` is the row with the modern recipe of
megabyte_jax/recipe.py, `ROW+swiglu` and `ROW+modern-swiglu` with one change of it or with all but one.
"""

import dataclasses
import math

from megabyte_jax import flops, recipe
from megabyte_jax.config import EvalConfig, Level, MegabyteConfig, MeshConfig
from megabyte_jax.paper_configs import config_of

BYTES_PER_STEP = 2**15
BYTES_AT_ONCE = 2**16
TRAIN_BYTES = 2**27
INIT_STD = 0.04


def get_config(name="table2:books_megabyte"):
  row, changes = recipe.split_name(name)
  config = config_of(row)
  model = shrink_model(config.model)
  batch_size = max(1, bytes_per_step(config.data) // flops.predicted_bytes(model))
  num_steps = round(TRAIN_BYTES / (batch_size * flops.predicted_bytes(model)))
  small = dataclasses.replace(
    config,
    model=model,
    optimizer=dataclasses.replace(config.optimizer, warmup_steps=max(1, num_steps // 25)),
    mesh=MeshConfig(),
    eval=EvalConfig(every_steps=max(1, num_steps // 8), max_bytes=2**20, method=config.eval.method),
    batch_size=batch_size,
    accumulate=parts(batch_size, BYTES_AT_ONCE // flops.predicted_bytes(model)),
    num_steps=num_steps,
  )
  return recipe.with_changes(small, changes).to_config_dict()


def bytes_per_step(data) -> int:
  image = 3 * data.image_size**2 if data.form == "image" else 1
  return image * max(1, round(BYTES_PER_STEP / image))


def parts(batch_size: int, at_once: int) -> int:
  """The fewest equal parts of a batch of which none has more than `at_once` rows, or one row."""
  return next(n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n <= max(1, at_once))


def shrink_model(model):
  if isinstance(model, MegabyteConfig):
    levels = tuple(shrink_level(level) for level in model.levels)
    return dataclasses.replace(model, levels=levels, remat="named", init_std=INIT_STD)
  level = shrink_level(model.level)
  names = ("width", "num_layers", "num_heads", "head_dim")
  return dataclasses.replace(model, remat="named", init_std=INIT_STD, **{name: getattr(level, name) for name in names})


def shrink_level(level: Level) -> Level:
  unit = math.lcm(level.patch_size, 8)  # widths are rounded up to what the patch size divides
  return dataclasses.replace(
    level,
    width=-(-level.width // 2 // unit) * unit,
    num_layers=-(-level.num_layers // 2),
    num_heads=max(1, level.num_heads // 2),
    head_dim=level.heads[1],
  )
