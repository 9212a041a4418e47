"""Any row of the paper's tables at about an eighth of its compute per byte, for one GPU and a hundred megabytes.

It shows in minutes that a row works, but not which model is better: the rule puts MEGABYTE at a disadvantage
(docs/results.md, half-size comparisons). configs/recipe.py is the better start for a model of your own.

  python train.py --config=configs/small.py:table2:books_megabyte --workdir=runs/small/books_megabyte \
    --config.data.train=corpora/books/train --config.data.validation=corpora/books/validation

One rule for every row:

- Half the width and half the layers of every level, heads as wide as they were; context, patch size, latents,
  extensions and inference method stay.
- All rows of a data set predict equally many bytes a step, so that they are updated equally often: 32,768, whole
  images that come closest to it, or 524,288 bytes of sound. A batch of many windows is worked through in parts of at
  most 65,536 bytes. So MEGABYTE has one image of 256 pixels a step where the paper takes 16, which costs it much;
  `--config.batch_size=16 --config.accumulate=4` gives it 16.
- 134 million bytes in all, a twenty-fifth of the steps to warm up. The learning rate is the paper's for the full size:
  try others.
- Three things help a short run to leave its first plateau, where a byte is predicted from the one before it; otherwise
  when it leaves that decides more than the model does. Parameters are drawn with a deviation of 0.04, about
  width^-0.5, not 0.006. Every level has rotary positions beside the learned ones, of which a hundred megabytes
  teach too little where contexts are long: windowed attention stayed on the plateau for 1,450 steps. And where there
  is a level above, what it says begins no larger than a byte's embedding (`parent_init=balanced`).

benchmarks/comparisons.py runs whole tables of these. `ROW+modern` is the row with the modern recipe of
megabyte_jax/paper/recipe.py, `ROW+swiglu` and `ROW+modern-swiglu` with one change of it or with all but one. `ROW@4`
has a quarter of the widths and layers instead of half, `ROW@1` all.
"""

import dataclasses
import math
import re

from megabyte_jax.config import EvalConfig, Level, MeshConfig
from megabyte_jax.errors import require
from megabyte_jax.paper import recipe
from megabyte_jax.paper.rows_by_name import config_of

BYTES_PER_STEP = 2**15
BYTES_AT_ONCE = 2**16
TRAIN_BYTES = 2**27
INIT_STD = 0.04


def get_config(name="table2:books_megabyte"):
  given = sorted({"init", "rotary"} & set(re.split("[+-]", name)[1:]))
  require(not given, f"{name}: {' and '.join(given)} change nothing here, every row of configs/small.py has them")
  row, changes = recipe.split_name(name)
  row, _, divisor = row.partition("@")
  require(divisor in ("", "1", "2", "4", "8"), f"{name}: @{divisor} is none of @1, @2, @4 and @8")
  config = recipe.with_changes(config_of(row), changes)
  model = shrink_model(config.model, int(divisor or 2))
  batch_size = max(1, bytes_per_step(config.data) // model.predicted_bytes)
  num_steps = round(TRAIN_BYTES / (batch_size * model.predicted_bytes))
  return dataclasses.replace(
    config,
    model=model,
    optimizer=dataclasses.replace(config.optimizer, warmup_steps=max(1, num_steps // 25)),
    mesh=MeshConfig(),
    eval=EvalConfig(every_steps=max(1, num_steps // 8), max_bytes=2**20, method=config.eval.method),
    batch_size=batch_size,
    accumulate=parts(batch_size, BYTES_AT_ONCE // model.predicted_bytes),
    num_steps=num_steps,
  ).to_config_dict()


def bytes_per_step(data) -> int:
  if data.form == "audio":
    return 2**19  # one window of MEGABYTE's
  image = 3 * data.image_size**2 if data.form == "image" else 1
  return image * max(1, round(BYTES_PER_STEP / image))


def parts(batch_size: int, at_once: int) -> int:
  """Returns the fewest equal parts of a batch of which none has more than `at_once` rows, or one row."""
  return next(n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n <= max(1, at_once))


def shrink_model(model, divisor: int):
  levels = tuple(shrink_level(level, divisor) for level in model.levels)
  balanced = {"parent_init": "balanced"} if len(levels) > 1 else {}
  return dataclasses.replace(model.with_levels(levels), remat="named", init_std=INIT_STD, **balanced)


def shrink_level(level: Level, divisor: int) -> Level:
  unit = math.lcm(level.patch_size, 8)  # widths are rounded up to what the patch size divides
  return dataclasses.replace(
    level,
    width=-(-level.width // divisor // unit) * unit,
    num_layers=-(-level.num_layers // divisor),
    num_heads=max(1, level.num_heads // divisor),
    head_dim=level.heads[1],
    ff_width=-(-level.ff_width // divisor // 8) * 8,
    rotary=True,
  )
