"""Compute matching: how many layers give a candidate the cost of a reference (section 4.1, appendix A.2).

  python -m megabyte_jax.matching --reference=configs/paper/table2.py:pg19_megabyte \\
    --candidate=configs/paper/table2.py:pg19_transformer

prints the candidate's layers at which the costs per predicted byte agree best, and the flag that sets them.

  --by=flops  analytic training FLOPs (causal attention; instant)
  --by=time   measured seconds of the training step, on the devices at hand, as the paper did. Reduce the batches
              with --reference.batch_size and --candidate.batch_size where the configs' own do not fit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from megabyte_jax import command_line, flops
from megabyte_jax.config import Config
from megabyte_jax.config_parsing import require
from megabyte_jax.models.config import PerceiverARConfig
from megabyte_jax.sharding import batch_sharding, make_mesh
from megabyte_jax.train_state import initial_state, make_train_step

Cost = Callable[[Config], float]  # of one predicted byte, in any unit


@dataclasses.dataclass(frozen=True)
class Match:
  """The candidate with its solved number of layers.

  Attributes:
    config: the candidate with `layers` layers in level `level` (counted from 0).
    cost, reference_cost: per predicted byte.
    tried: layers -> cost, all that were looked at.
  """

  config: Config
  layers: int
  level: int
  cost: float
  reference_cost: float
  tried: dict[int, float]

  @property
  def ratio(self) -> float:
    """Cost of the candidate relative to the reference."""
    return self.cost / self.reference_cost

  @property
  def override(self) -> str:
    """The flag of train.py that sets the layers."""
    levels = "" if isinstance(self.config.model, PerceiverARConfig) else f".levels[{self.level}]"
    return f"--config.model{levels}.num_layers={self.layers}"


def match(reference: Config, candidate: Config, cost: Cost, level: int = -1) -> Match:
  """The number of layers of the candidate's level `level` that brings its cost closest to the reference's.

  Args:
    cost: `training_flops` or `seconds_per_byte`, or any other that grows with the layers.
    level: which of MEGABYTE's levels; -1 is the finest.

  Raises:
    ConfigError: the candidate has no such level.
  """
  start = layers_of(candidate, level)
  target = cost(reference)
  layers, tried = solve(lambda layers: cost(with_layers(candidate, layers, level)), target, start)
  count = 1 if isinstance(candidate.model, PerceiverARConfig) else len(candidate.model.levels)
  return Match(with_layers(candidate, layers, level), layers, level % count, tried[layers], target, tried)


def solve(cost: Callable[[int], float], target: float, start: int) -> tuple[int, dict[int, float]]:
  """The n >= 1 with cost(n) nearest to `target`, for a growing cost; it is evaluated as rarely as possible.

  Returns:
    n, and all values of n tried with their costs.
  """
  tried: dict[int, float] = {}
  below, above = 0, None  # the answer lies between or at them; 0 layers are no model
  n = start
  while True:
    tried[n] = cost(n)
    if tried[n] <= target:
      below = n
    else:
      above = n
    if above is not None and above - below == 1:
      break
    highest = 4 * below if above is None else above - 1
    n = min(highest, max(below + 1, _guess(tried, target)))
  return min((n for n in (below, above) if n in tried), key=lambda n: abs(tried[n] - target)), tried


def _guess(tried: dict[int, float], target: float) -> int:
  """Where the line through the two points nearest to the target meets it; costs grow linearly with layers."""
  a, *rest = sorted(tried, key=lambda n: abs(tried[n] - target))
  slope = (tried[rest[0]] - tried[a]) / (rest[0] - a) if rest else 0
  return round(a + (target - tried[a]) / slope if slope > 0 else a * target / tried[a])


def layers_of(config: Config, level: int = -1) -> int:
  """Layers of a level (PerceiverAR: those above the cross-attention); raises ConfigError if there is no such level."""
  if isinstance(config.model, PerceiverARConfig):
    return config.model.num_layers
  count = len(config.model.levels)
  require(-count <= level < count, f"--level is {level}, but the candidate has {count} levels; take 0 to {count - 1}")
  return config.model.levels[level].num_layers


def with_layers(config: Config, layers: int, level: int = -1) -> Config:
  """`config` with another number of layers in one level."""
  model = config.model
  if isinstance(model, PerceiverARConfig):
    return dataclasses.replace(config, model=dataclasses.replace(model, num_layers=layers))
  levels = list(model.levels)
  levels[level] = dataclasses.replace(levels[level], num_layers=layers)
  return dataclasses.replace(config, model=dataclasses.replace(model, levels=tuple(levels)))


def training_flops(config: Config) -> float:
  """Analytic cost: forward and backward FLOPs per predicted byte, causal attention."""
  return flops.flops_per_byte(config.model, training=True)


def seconds_per_byte(config: Config, steps: int = 10, warmup_seconds: float = 3.0) -> float:
  """Measured cost: median seconds of a training step on random bytes, per predicted byte.

  Args:
    steps: steps that are timed.
    warmup_seconds: steps before, besides compilation, for the clocks to settle under load.

  Raises:
    ConfigError: the loss is not finite, so that the time means nothing (chips run faster on NaN).
  """
  mesh = make_mesh(config.mesh)
  shape = (config.batch_size, config.model.context)
  x_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.uint8)
  x_BT = jax.make_array_from_callback(shape, batch_sharding(mesh), lambda index: x_BT[index])
  with jax.set_mesh(mesh):
    state, train_step = initial_state(config, mesh), make_train_step(config)

    def timed_step() -> tuple[float, float]:
      nonlocal state
      start = time.perf_counter()
      state, metrics = train_step(state, x_BT)
      nats = float(metrics["nats"])  # waits for the step
      return time.perf_counter() - start, nats

    timed_step()  # compiles
    until = time.perf_counter() + warmup_seconds
    while time.perf_counter() < until:
      timed_step()
    times, nats = zip(*(timed_step() for _ in range(steps)), strict=True)
  require(
    all(map(math.isfinite, nats)),
    f"the loss is {nats[-1]} after a few steps, so that their time means nothing; set a lower optimizer.learning_rate",
  )
  return statistics.median(times) / (config.batch_size * flops.predicted_bytes(config.model))


def report(found: Match, reference: Config, unit: str) -> str:
  """What was found, for people."""
  rows = [("", "layers", unit, ""), ("reference", _layers(reference), f"{found.reference_cost:.4g}", "")]
  for layers, cost in sorted(found.tried.items()):
    mark = f"<- {found.ratio:.1%} of the reference" if layers == found.layers else ""
    rows.append(("candidate", _layers(with_layers(found.config, layers, found.level)), f"{cost:.4g}", mark))
  return "\n".join([*(f"{a:10}{b:>8}{c:>26}  {d}".rstrip() for a, b, c, d in rows), found.override])


def _layers(config: Config) -> str:
  levels = (config.model,) if isinstance(config.model, PerceiverARConfig) else config.model.levels
  return "+".join(str(level.num_layers) for level in levels)


_REFERENCE = config_flags.DEFINE_config_file("reference", help_string="config whose cost is to be matched")
_CANDIDATE = config_flags.DEFINE_config_file("candidate", help_string="config whose layers are solved for")
_BY = flags.DEFINE_enum("by", "flops", ["flops", "time"], "what to match: analytic FLOPs or measured time")
_LEVEL = flags.DEFINE_integer("level", -1, "level of the candidate whose layers vary, from 0; -1 is the finest")
_STEPS = flags.DEFINE_integer("steps", 10, "training steps timed for each number of layers", lower_bound=1)


def main(argv: Sequence[str]) -> None:
  """Prints the solution."""
  require(len(argv) == 1, f"{' '.join(argv[1:])!r} is no flag; give --reference=CONFIG and --candidate=CONFIG")
  for name, value in (("reference", _REFERENCE.value), ("candidate", _CANDIDATE.value)):
    require(value is not None, f"--{name} is missing; give a config, such as configs/paper/table2.py:pg19_megabyte")
  reference, candidate = Config.from_dict(_REFERENCE.value), Config.from_dict(_CANDIDATE.value)
  cost = training_flops if _BY.value == "flops" else functools.partial(seconds_per_byte, steps=_STEPS.value)
  unit = "training FLOPs/byte" if _BY.value == "flops" else "seconds/byte, training"
  print(report(match(reference, candidate, cost, _LEVEL.value), reference, unit))


if __name__ == "__main__":
  app.run(lambda argv: command_line.run(lambda: main(argv)), flags_parser=command_line.parse_config_flags)
