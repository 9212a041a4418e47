"""Measures how soon a model learns to copy repeats, and what it is to MEGABYTE where they lie in its patches.

  python benchmarks/repeats.py --output=docs/results/repeats.json

Each window of 128 bytes is a random string of 16 letters, 32 to 64 long, again and again. So there is nothing to learn
but copying: a byte costs 4 bits without it, and 1.5 on average with it, when only the first string costs any. To a
Transformer all lengths are alike. To MEGABYTE they are not: after a string of 40 bytes the same bytes come in the same
places of patches (here of 4 bytes) again, after one of 41 in others, and so in other patches.

Every case is the same number of steps on as many bytes, on a CPU a quarter of an hour each. Prints a table, and writes
OUTPUT and a picture beside it.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from megabyte_jax import Level, MegabyteConfig
from megabyte_jax.commands.arguments import Parser
from megabyte_jax.config import Config, DataConfig, OptimizerConfig
from megabyte_jax.display import plots
from megabyte_jax.display.progress import Progress
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.models.loss import bits_per_byte
from megabyte_jax.parallel.sharding import make_mesh
from megabyte_jax.training.state import initial_state, make_train_step

CONTEXT, BATCH, PATCH, LETTERS = 128, 16, 4, 16
SHORTEST, LONGEST = 32, 64  # strings
EVERY = 50  # steps that are one point of a curve


def level(patch_size: int, width: int, num_layers: int, cross_patch: int = 0) -> Level:
  return Level(
    patch_size=patch_size, width=width, num_layers=num_layers, num_heads=4, rotary=True, cross_patch=cross_patch
  )


def model(*levels: Level) -> MegabyteConfig:
  return MegabyteConfig(context=CONTEXT, levels=levels, init_std=0.04, dropout=0.0, parent_init="balanced")


MEGABYTE = model(level(PATCH, 128, 3), level(1, 64, 2, cross_patch=PATCH))
CASES = {  # the model, and of what the lengths of strings are multiples
  "Transformer": (MegabyteConfig(context=CONTEXT, levels=(level(1, 64, 3),), init_std=0.04, dropout=0.0), 1),
  "MEGABYTE, in step with patches": (MEGABYTE, PATCH),
  "MEGABYTE": (MEGABYTE, 1),
}


def windows(random: np.random.Generator, multiple: int) -> np.ndarray:
  """Draws windows of repeated strings, uint8 [BATCH, CONTEXT]."""
  x_BT = np.empty((BATCH, CONTEXT), np.uint8)
  for row in x_BT:
    length = multiple * int(random.integers(SHORTEST // multiple, LONGEST // multiple + 1))
    row[:] = np.resize(random.integers(ord("a"), ord("a") + LETTERS, length), CONTEXT)
  return x_BT


def learn(config: MegabyteConfig, multiple: int, steps: int, name: str) -> list[float]:
  """Trains, and returns the training bits per byte, each the mean of EVERY steps."""
  optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=max(1, steps // 25), schedule="wsd")
  made = Config(model=config, data=DataConfig(train="-"), batch_size=BATCH, num_steps=steps, optimizer=optimizer)
  state, step = initial_state(made, make_mesh(made.mesh, jax.devices()[:1])), make_train_step(made)
  random, nats = np.random.default_rng(0), []
  with Progress(name, total=steps * BATCH * CONTEXT, compiles=True) as progress:
    for _ in range(steps):
      state, metrics = step(state, jnp.asarray(windows(random, multiple)), None)
      nats.append(float(metrics["nats"]))
      progress.add(BATCH * CONTEXT)
  sums = np.add.reduceat(nats, np.arange(0, steps, EVERY)) / np.diff([*range(0, steps, EVERY), steps])
  return [round(bits_per_byte(n, BATCH * CONTEXT), 4) for n in sums]


def main() -> None:
  parser = Parser("python benchmarks/repeats.py", description=__doc__)
  parser.add_argument("--steps", type=int, default=8000)
  parser.add_argument("--output", default="", help="the curves, as JSON; a picture is drawn beside it")
  args = parser.parse_args()
  curves = {}
  for name, case in CASES.items():
    curves[name] = bits = learn(*case, args.steps, name)
    print(f"{name:<32}", *(f"{bits[i * (len(bits) - 1) // 8]:6.2f}" for i in range(1, 9)), flush=True)
  if args.output:
    run = {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "command": " ".join(sys.argv),
      "device": jax.devices()[0].device_kind,
      "versions": f"jax {jax.__version__}",
      "steps_a_point": EVERY,
    }
    with replacing(args.output) as path:
      path.write_text(json.dumps(run | {"curves": curves}, indent=1) + "\n")
    x = [(i + 0.5) * EVERY * BATCH * CONTEXT / 1e6 for i in range(len(curves["MEGABYTE"]))]
    shown = {name: (x, bits) for name, bits in curves.items()}
    picture = str(pathlib.Path(args.output).with_suffix(".png"))
    plots.lines(shown, "Learning to copy", "million bytes", "bits per byte", picture)


if __name__ == "__main__":
  main()
