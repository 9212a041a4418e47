"""Matches compute: solves for the layers that give a candidate a reference's cost (section 4.1, appendix A.2)."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable

from megabyte_jax.config import Config
from megabyte_jax.errors import require
from megabyte_jax.models import flops
from megabyte_jax.planning.step_time import TimedStep, time_ratios

Cost = Callable[[Config], float]  # of one byte that a candidate predicts, relative to the reference


@dataclasses.dataclass(frozen=True)
class Match:
  """A candidate with its solved number of layers.

  Attributes:
    config: the candidate with `layers` layers in level `level` (counted from 0).
    tried: layers -> cost relative to the reference, for every number of layers that was evaluated.
  """

  config: Config
  layers: int
  level: int
  tried: dict[int, float]

  @property
  def ratio(self) -> float:
    """Cost of the candidate relative to the reference."""
    return self.tried[self.layers]

  @property
  def override(self) -> str:
    """The flag of train.py that sets the layers."""
    return f"--config.{self.config.model.level_key(self.level)}.num_layers={self.layers}"


def match(candidate: Config, cost: Cost, level: int = -1) -> Match:
  """Solves for the layers of the candidate's level `level` that bring its cost closest to 1, the reference's.

  Args:
    candidate: the config whose layers vary.
    cost: cost relative to the reference, such as `flops_ratio`; it must grow with the layers.
    level: index among the model's levels; -1 is the finest.

  Raises:
    ConfigError: the candidate has no such level.
  """
  start = layers_of(candidate, level)
  layers, tried = solve(lambda layers: cost(with_layers(candidate, layers, level)), 1.0, start)
  return Match(with_layers(candidate, layers, level), layers, level % len(candidate.model.levels), tried)


def solve(cost: Callable[[int], float], target: float, start: int) -> tuple[int, dict[int, float]]:
  """Finds the n >= 1 whose cost(n) is nearest to `target`, for a growing cost, with few evaluations.

  Returns:
    n, and every n tried with its cost.
  """
  tried: dict[int, float] = {}
  below, above = 0, None  # the answer lies between or at them; 0 layers are not a model
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
  """Interpolates: the line through the two points nearest to the target; costs grow linearly with layers."""
  a, *rest = sorted(tried, key=lambda n: abs(tried[n] - target))
  slope = (tried[rest[0]] - tried[a]) / (rest[0] - a) if rest else 0
  return round(a + (target - tried[a]) / slope if slope > 0 else a * target / tried[a])


def layers_of(config: Config, level: int = -1) -> int:
  """Returns the layers of a level, for PerceiverAR those above the cross-attention.

  Raises:
    ConfigError: there is no such level.
  """
  count = len(config.model.levels)
  require(-count <= level < count, f"--level is {level}, but the candidate has {count} levels; take 0 to {count - 1}")
  return config.model.levels[level].num_layers


def with_layers(config: Config, layers: int, level: int = -1) -> Config:
  """Returns `config` with another number of layers in one level."""
  return dataclasses.replace(config, model=config.model.with_layers(layers, level))


def flops_ratio(candidate: Config, reference: Config) -> float:
  """Returns the analytic training FLOPs per predicted byte (causal attention), relative to the reference."""
  ours, theirs = (flops.flops_per_byte(config.model, training=True) for config in (candidate, reference))
  return ours / theirs


def cost_against(reference: Config, by: str, rounds: int = 10) -> Cost:
  """Returns the function that gives a candidate's cost per predicted byte relative to `reference`.

  Args:
    reference: the config with cost 1.
    by: flops | time. Measured times and their spread are printed to stderr as they come.
    rounds: of measurement for each candidate; only for time.
  """
  if by == "flops":
    return lambda candidate: flops_ratio(candidate, reference)
  timed = TimedStep(reference)

  def cost(candidate: Config) -> float:
    ratios = time_ratios(TimedStep(candidate), timed, rounds)
    found = statistics.median(ratios)
    spread = f"{min(ratios):.1%} to {max(ratios):.1%} in {len(ratios)} rounds"
    print(f"candidate with {layers_text(candidate)} layers: {found:.1%} of the reference ({spread})", file=sys.stderr)
    return found

  return cost


def report(found: Match, reference: Config, unit: str) -> str:
  """Returns the table of the layers tried and the flag that sets the result, as text.

  Args:
    found: the result of `match`.
    reference: the config with cost 1.
    unit: heading of the column of costs.
  """
  rows = [("", "layers", unit, ""), ("reference", layers_text(reference), "100.0%", "")]
  for layers, cost in sorted(found.tried.items()):
    mark = "<- closest" if layers == found.layers else ""
    rows.append(("candidate", layers_text(with_layers(found.config, layers, found.level)), f"{cost:.1%}", mark))
  return "\n".join([*(f"{a:10}{b:>8}{c:>30}  {d}".rstrip() for a, b, c, d in rows), found.override])


def layers_text(config: Config) -> str:
  """Returns the layers of each level as text, such as 24+15."""
  return "+".join(str(level.num_layers) for level in config.model.levels)
