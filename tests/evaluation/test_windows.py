"""Window plans: every byte once, with the context that each method promises."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.config import Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation import windows


def megabyte(context, *patches, span=0):
  levels = tuple(Level(patch_size=p, width=2 * p, num_layers=1, num_heads=1) for p in patches)
  return MegabyteConfig(context=context, levels=levels, span=span)


def perceiver(context, latents):
  return PerceiverARConfig(context=context, latents=latents, width=8, num_layers=1, num_heads=1)


def scored_bytes(plan):
  """(absolute positions, the window of each), in the plan's order."""
  return [(w.start + i, w) for w in plan for i in np.flatnonzero(windows.scored_mask(w))]


@st.composite
def megabyte_cases(draw):
  patch = draw(st.integers(1, 9))
  context = patch * draw(st.integers(1, 8))
  method = draw(st.sampled_from(windows.METHODS[: 4 if patch > 1 else 2]))
  stride = draw(st.integers(0, context)) if method in ("sliding", "both") else 0
  return draw(st.integers(0, 5 * context + patch)), megabyte(context, patch), method, stride


@given(megabyte_cases())
@settings(max_examples=300, deadline=None)
def test_every_byte_is_scored_once_with_the_promised_context(case):
  length, config, method, stride = case
  plan = list(windows.windows_of(length, config, method, stride))
  scored = scored_bytes(plan)
  assert sorted(t for t, _ in scored) == list(range(length))
  context, patch = config.context, config.levels[0].patch_size
  strided = method in ("strided", "both")
  for t, w in scored:
    assert w.start >= 0 and 0 < w.length <= context and w.start + w.length <= length
    if method in ("sliding", "both"):
      shift = patch // 2 if strided else 0
      assert t - w.start >= min(t, context - (stride or config.default_stride)) - shift
    if strided and w.start + w.whole <= t:
      assert (t - w.start) % patch < (patch + 1) // 2
  assert all(windows.scored_mask(w).any() for w in plan)


@st.composite
def perceiver_cases(draw):
  context = draw(st.integers(1, 40))
  latents = draw(st.integers(1, context))
  stride = draw(st.integers(0, latents))
  return draw(st.integers(0, 150)), perceiver(context, latents), stride


@given(perceiver_cases())
@settings(max_examples=300, deadline=None)
def test_perceiver_scores_every_byte_once_among_its_latents(case):
  length, config, stride = case
  scored = scored_bytes(windows.windows_of(length, config, "basic", stride))
  assert sorted(t for t, _ in scored) == list(range(length))
  stride = stride or config.default_stride
  for t, w in scored:
    assert 0 < w.length <= config.context
    assert w.latent_start <= t - w.start < w.latent_start + config.latents
    assert w.length - w.latent_start <= config.latents
    assert t - w.start >= min(t, config.context - stride)  # bytes of context
    assert t - w.start - w.latent_start >= min(t, config.latents - stride)  # latents before it
  full = [w for w in windows.windows_of(length, config, "basic", stride) if w.start + w.length < length]
  assert all(w.latent_start == max(0, w.length - config.latents) for w in full)


def test_strided_on_the_papers_example():
  """Fig. 5: P = 8, pass A's patches start at 0, 8, ..., pass B's first one at byte 4."""
  a, b = windows.windows_of(24, megabyte(24, 8), "strided")
  assert (a.start, a.length, b.start, b.length) == (0, 24, 4, 20)
  assert np.flatnonzero(windows.scored_mask(a)).tolist() == [*range(8), *range(8, 12), *range(16, 20)]
  assert (4 + np.flatnonzero(windows.scored_mask(b))).tolist() == [*range(12, 16), *range(20, 24)]


def test_strided_with_an_odd_patch_and_a_partial_tail():
  a, b = windows.windows_of(13, megabyte(15, 5), "strided")
  assert np.flatnonzero(windows.scored_mask(a)).tolist() == [*range(5), 5, 6, 10, 11]
  assert (2 + np.flatnonzero(windows.scored_mask(b))).tolist() == [7, 8, 9, 12]


def test_sliding_moves_by_half_the_context():
  plan = list(windows.windows_of(20, megabyte(8, 4, 1), "sliding"))
  assert [(w.start, w.length, w.score_from, w.score_to) for w in plan] == [
    (0, 8, 0, 8),
    (4, 8, 4, 8),
    (8, 8, 4, 8),
    (12, 8, 4, 8),
  ]


def test_perceiver_grows_to_its_context():
  plan = list(windows.windows_of(20, perceiver(12, 4), "basic"))
  assert [(w.start, w.length, w.latent_start) for w in plan[:6]] == [
    (0, 4, 0),
    (0, 6, 2),
    (0, 8, 4),
    (0, 10, 6),
    (0, 12, 8),
    (2, 12, 8),
  ]
  assert plan == list(windows.windows_of(20, perceiver(12, 4), "sliding"))


@given(st.integers(0, 200), st.one_of(megabyte_cases(), perceiver_cases()))
@settings(max_examples=200, deadline=None)
def test_generation_sees_what_sliding_evaluation_sees(position, case):
  """The window that predicts a byte does not depend on where the document ends."""
  config = case[1]
  start, latents = 0, isinstance(config, PerceiverARConfig)
  size = config.latents if latents else config.context
  while position >= start + size:
    start += config.default_stride
  assert start == windows.window_start(position, config)
  (window,) = [w for t, w in scored_bytes(windows.windows_of(position + 1, config, "sliding")) if t == position]
  if latents:
    assert (window.start, window.start + window.latent_start) == (windows.latents_window(start, config), start)
  else:
    assert window.start == start
  room = min(config.context, window.latent_start + size)
  assert windows.generation_window(position, config) == (window.start, room, window.latent_start)
  later = dict(scored_bytes(windows.windows_of(position + 77, config, "sliding")))[position]
  assert (later.start, later.latent_start) == (window.start, window.latent_start)


def test_default_strides():
  assert megabyte(8192, 8, 1).default_stride == 4096
  assert megabyte(36, 12, 1).default_stride == 12
  assert megabyte(12, 12).default_stride == 6
  assert megabyte(64, 1, span=16).default_stride == 32
  assert perceiver(8192, 1024).default_stride == 512


def test_cost_factors():
  config = megabyte(64, 8, 1)
  assert [windows.cost_factor(m, config) for m in windows.METHODS] == [1, 2, 2, 4]
  assert windows.cost_factor("both", config, stride=16) == 8
  assert windows.cost_factor("basic", perceiver(64, 16)) == 2
  for method in windows.METHODS:
    read = sum(w.length for w in windows.windows_of(64 * 200, config, method)) / (64 * 200)
    assert read == pytest.approx(windows.cost_factor(method, config), rel=0.05)


@pytest.mark.parametrize(
  ("config", "method", "stride", "message"),
  [
    (megabyte(8, 1), "strided", 0, "first level reads single bytes; take basic or sliding"),
    (megabyte(16, 1, span=8), "both", 0, "first level reads single bytes"),
    (perceiver(8, 4), "strided", 0, "first level reads single bytes"),
    (megabyte(8, 4), "slidin", 0, "choose one of basic, sliding, strided, both"),
    (megabyte(8, 4), "sliding", 9, "between 1 and model.context"),
    (megabyte(8, 4), "sliding", -1, "between 1 and model.context"),
    (perceiver(8, 4), "basic", 5, "between 1 and model.latents"),
    (megabyte(8, 4), "basic", 4, "does not slide"),
  ],
)
def test_what_does_not_fit_is_one_clear_error(config, method, stride, message):
  with pytest.raises(ConfigError, match=message):
    windows.windows_of(10, config, method, stride)


def test_windows_are_values():
  w = windows.Window(0, 4, 0, 4)
  assert dataclasses.replace(w) == w and windows.scored_mask(w).all()
