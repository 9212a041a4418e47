"""Small models of free sizes, each with a recipe, for one GPU and some hundred megabytes of text.

  python train.py --config=configs/recipe.py:megabyte:4:768x6:384x6+modern --workdir=runs/recipe \
    --config.data.train=corpora/library/train --config.data.validation=corpora/library/validation

  megabyte:P:WIDTHxLAYERS:WIDTHxLAYERS      MEGABYTE with patches of P bytes, global and local; context 4,096, or what
                                            whole patches make of it
  transformer:WIDTHxLAYERS                  every byte sees all of a context of 1,024
  windowed:WIDTHxLAYERS                     every byte sees the 512 before it, context 4,096
  perceiver:WIDTHxLAYERS                    1,024 latents, context 4,096

and then the changes of megabyte_jax/paper/recipe.py: +modern (Muon) is the better recipe, +scaled the one for AdamW,
whose learning rate needs no tuning by width. 262,144 bytes a step, heads of 64 numbers, no dropout, parameters that a
recipe does not scale drawn with a deviation of 0.04. docs/results.md has what came out.
"""

import re
from typing import Any

from megabyte_jax.config import Config, EvalConfig, Level, MegabyteConfig, OptimizerConfig, PerceiverARConfig
from megabyte_jax.errors import require
from megabyte_jax.paper import recipe

BYTES_PER_STEP = 2**18
_CONTEXT, _SHORT_CONTEXT, _WINDOW = 4096, 1024, 512


def get_config(name="megabyte:4:768x6:384x6+modern"):
  row, changes = recipe.split_name(name)
  model = model_of(row)
  config = Config(
    model=model,
    optimizer=OptimizerConfig(learning_rate=5e-3, schedule="cosine", warmup_steps=64),
    eval=EvalConfig(every_steps=400, max_bytes=2**20),
    batch_size=BYTES_PER_STEP // model.predicted_bytes,
    num_steps=1600,
    log_every=50,
  )
  return recipe.with_changes(config, tuple(change for change in changes if change != "init")).to_config_dict()


def model_of(row):
  options: dict[str, Any] = dict(dropout=0.0, init_std=0.04, remat="none")
  family, *parts = row.split(":")
  patch = int(parts.pop(0)) if family == "megabyte" and parts and parts[0].isdigit() else 0
  shapes = [tuple(map(int, part.split("x"))) for part in parts if re.fullmatch(r"\d+x\d+", part)]
  wanted = 2 if family == "megabyte" else 1
  require(
    family in ("megabyte", "transformer", "windowed", "perceiver")
    and len(shapes) == len(parts) == wanted
    and (patch > 1) == (family == "megabyte"),
    f"{row}: write megabyte:P:WIDTHxLAYERS:WIDTHxLAYERS, transformer:, windowed: or perceiver:WIDTHxLAYERS",
  )
  require(
    all(width and width % 64 == 0 for width, _ in shapes), f"{row}: widths must be multiples of 64, a head's width"
  )
  if family == "perceiver":
    (width, layers) = shapes[0]
    return PerceiverARConfig(
      context=_CONTEXT,
      latents=_SHORT_CONTEXT,
      width=width,
      num_layers=layers,
      num_heads=width // 64,
      rotary=True,
      **options,
    )
  sizes = [patch, 1] if family == "megabyte" else [1]
  levels = tuple(
    Level(
      patch_size=size,
      width=width,
      num_layers=layers,
      num_heads=width // 64,
      rotary=True,
      attention_window=_WINDOW if family == "windowed" else 0,
    )
    for size, (width, layers) in zip(sizes, shapes, strict=True)
  )
  context = _SHORT_CONTEXT if family == "transformer" else _CONTEXT // sizes[0] * sizes[0]  # whole patches
  return MegabyteConfig(
    context=context, levels=levels, parent_init="balanced" if len(levels) > 1 else "paper", **options
  )
