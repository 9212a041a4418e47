"""Kernels of a decoding step take what they list, and compute it as the plain step does; all else is left to that."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.config import BlockOptions, Level
from megabyte_jax.models.kernels import cached_attention, decoding_step
from megabyte_jax.models.kernels.known_options import ANY, IN_ONE_KERNEL, LAYER_BY_LAYER
from megabyte_jax.models.layers.stack import Cache, Stack, unstacked
from megabyte_jax.models.parameters import Keys, as_rngs
from megabyte_jax.parallel.parameter_info import is_variable

WAYS = {"in one kernel": IN_ONE_KERNEL, "layer by layer": LAYER_BY_LAYER}
WIDE = Level(patch_size=1, width=64, num_layers=2, num_heads=2, head_dim=32, ff_width=128)


def unmentioned(known, level=Level, options=BlockOptions):
  """Fields that a list says nothing of."""
  mentioned = {level: known.level, options: known.options}
  return [f.name for cls, names in mentioned.items() for f in dataclasses.fields(cls) if f.name not in names]


@pytest.mark.parametrize("way", WAYS)
def test_every_field_is_listed(way):
  """Say in known_options.py for which values the kernels compute it right, after having looked."""
  assert unmentioned(WAYS[way]) == []
  listed = {**WAYS[way].level, **WAYS[way].options}
  for cls in (Level, BlockOptions):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
      if typing.get_origin(hints[field.name]) is typing.Literal and listed[field.name] is not ANY:
        assert set(listed[field.name]) <= set(typing.get_args(hints[field.name])), field.name


@pytest.mark.parametrize("way", WAYS)
def test_a_new_field_is_noticed_and_refused(monkeypatch, way):
  """As it would be if someone added one and did not think of the kernels."""

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Longer(Level):
    talking_heads: bool = False

  assert unmentioned(WAYS[way], Longer) == ["talking_heads"]
  level = Longer(**dataclasses.asdict(WIDE))
  assert WAYS[way].obstacle(level, BlockOptions()) == ""
  monkeypatch.setattr("megabyte_jax.models.kernels.known_options.Level", Longer)
  assert WAYS[way].obstacle(level, BlockOptions()) == "talking_heads is not among the options that it knows"
  assert "talking_heads" in decoding_step.obstacle(level, BlockOptions(), 1)
  assert "talking_heads" in cached_attention.obstacle(level, BlockOptions())


def test_values_that_are_not_listed_are_refused():
  odd = BlockOptions()
  object.__setattr__(odd, "activation", "geglu")
  assert "activation='geglu'" in cached_attention.obstacle(WIDE, odd)
  assert "activation='geglu'" in decoding_step.obstacle(WIDE, odd, 1)
  assert "qk_norm=True" in decoding_step.obstacle(WIDE, BlockOptions(qk_norm=True), 1)
  assert cached_attention.obstacle(WIDE, BlockOptions(qk_norm=True)) == ""
  assert "attention='xla'" in cached_attention.obstacle(WIDE, BlockOptions(attention="xla"))
  assert "one sample, not 2" in decoding_step.obstacle(WIDE, BlockOptions(), 2)
  assert "heads of 8" in cached_attention.obstacle(dataclasses.replace(WIDE, head_dim=8), BlockOptions())


def widened(level):
  """The level with its options, in the smallest sizes that kernels take; test_decoding_kernels.py has more layers."""
  sizes = ("width", "num_heads", "head_dim", "ff_width", "patch_size")
  return dataclasses.replace(level, conv_filters=(), num_layers=1, **{name: getattr(WIDE, name) for name in sizes})


def cases():
  """Name of a variant and of its level -> (wide level, options, slots of a span), each combination of options once."""
  seen, found = set(), {}
  for name, config in variants.VARIANTS.items():
    options = BlockOptions(**{f.name: getattr(config, f.name) for f in dataclasses.fields(BlockOptions)})
    for i, (level, span) in enumerate(zip(config.levels, config.spans, strict=True)):
      case = widened(level), options, span // level.patch_size
      if case[:2] not in seen:
        seen.add(case[:2])
        found[f"{name}, level {i}"] = case
  return found


CASES = cases()


@functools.cache
def plain_step(name):
  """A stack with every parameter drawn, and one plain step of two rows in the middle of a span, after another span."""
  level, options, slots = CASES[name]
  stack = nnx.eval_shape(lambda: Stack(level, dataclasses.replace(options, dropout=0.0), as_rngs(Keys(None))))
  rng = np.random.default_rng(0)
  graph, state = nnx.split(stack)
  state = jax.tree.map(lambda a: rng.normal(1.0 if a.ndim < 3 else 0.0, 0.1, a.shape).astype(np.float32), state)
  r = level.cross_patch
  shape = (level.num_layers, 2, 1, r + slots, *level.heads)
  cache = Cache(*(jnp.asarray(rng.normal(size=shape).astype(np.float32)) for _ in range(2)))
  x = jnp.asarray(rng.normal(size=(2, 1, 1, level.width)).astype(np.float32))
  arguments = jnp.int32(slots // 2), True
  expected = jax.jit(lambda state: nnx.merge(graph, state).step(x, cache, *arguments))(state)
  return graph, state, x, cache, arguments, expected


IN_TIME = ("three_levels_cross_patch, level 2", "swiglu, level 0", "qk_norm, level 0")
ROWS = [  # a whole stack in one kernel, interpreted, takes ten seconds
  pytest.param(name, rows, marks=pytest.mark.slow) if rows == 1 and name not in IN_TIME else (name, rows)
  for name in CASES
  for rows in (1, 2)
]


@pytest.mark.parametrize(("name", "rows"), ROWS)
def test_every_variant_is_computed_as_the_plain_step_does_or_refused(monkeypatch, name, rows):
  level, options, _ = CASES[name]
  graph, state, x, cache, arguments, (expected, expected_cache) = plain_step(name)
  in_one = rows == 1 and not options.qk_norm
  assert (decoding_step.obstacle(level, options, rows) == "") == in_one
  assert cached_attention.obstacle(level, options) == ""
  calls = []
  for module, function in ((decoding_step, "step"), (cached_attention, "attend")):
    original = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *a, f=original, n=function, **o: calls.append(n) or f(*a, **o))
  monkeypatch.setattr(cached_attention, "on_one_gpu", lambda dtype: True)
  monkeypatch.setattr("megabyte_jax.models.layers.stack.each_in_one_kernel", lambda config, rows: in_one)
  if not in_one:
    state = nnx.State({**state, "blocks": jax.tree.map(unstacked, state["blocks"], is_leaf=is_variable)})

  def step(state):
    return nnx.merge(graph, state).step(x[:rows], Cache(*(a[:, :rows] for a in cache)), *arguments)

  made, made_cache = jax.jit(step)(state)
  assert set(calls) == {"step" if in_one else "attend"}
  np.testing.assert_allclose(made, expected[:rows], atol=2e-5)
  for a, b in zip(made_cache, expected_cache, strict=True):
    np.testing.assert_allclose(a, b[:, :rows], atol=2e-5)


@pytest.mark.parametrize("name", variants.every_variant)
def test_narrow_variants_are_refused(name):
  config = variants.VARIANTS[name]
  assert all("heads of" in cached_attention.obstacle(level, config) for level in config.levels)
  assert all(decoding_step.obstacle(level, config, 1) for level in config.levels)
