"""Cuts documents into the windows that a model reads, and decides which bytes each window scores.

Evaluation, compression and generation past the context all take their windows from here. Section 2.3.3 of the paper
describes two ways to spend more compute on a better estimate; Table 11 has their cost:

  basic     adjacent windows                                                                   1x
  sliding   windows overlap by half; each scores only the new bytes                            2x
  strided   every window twice, patches shifted by half a patch; each pass keeps the first
            half of its patches, where predictions are best (Fig. 5)                           2x
  both      strided inside sliding                                                             4x

With every method, the windows of a document score each of its bytes exactly once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_args

import numpy as np

from megabyte_jax.config import MegabyteConfig, ModelConfig, PerceiverARConfig
from megabyte_jax.config.model import latent_stride
from megabyte_jax.config.run import Method
from megabyte_jax.errors import require

METHODS: tuple[str, ...] = get_args(Method)


@dataclasses.dataclass(frozen=True)
class Window:
  """Bytes [start, start + length) of a document, read together; all other fields are relative to `start`.

  Position i is scored if score_from <= i < score_to and (i % patch < kept or i < whole).

  Attributes:
    start: first byte, counted in the document.
    length: bytes in the window.
    score_from, score_to: range of positions that may be scored.
    patch, kept: only the first `kept` positions of each patch of `patch` bytes are scored; (1, 1) keeps all.
    whole: positions before this one are scored at any place in the patch.
    latent_start: position of PerceiverAR's first latent. At most N latents follow, fewer only where the document ends.
  """

  start: int
  length: int
  score_from: int
  score_to: int
  patch: int = 1
  kept: int = 1
  whole: int = 0
  latent_start: int = 0


def scored_mask(window: Window) -> np.ndarray:
  """Returns the positions that a window scores, bool [window.length]."""
  position = np.arange(window.length)
  in_range = (window.score_from <= position) & (position < window.score_to)
  return in_range & ((position % window.patch < window.kept) | (position < window.whole))


def windows_of(document_length: int, config: ModelConfig, method: str = "basic", stride: int = 0) -> Iterator[Window]:
  """Yields the windows that score a document.

  Args:
    document_length: bytes.
    config: the model.
    method: basic | sliding | strided | both. PerceiverAR's basic is its paper's own evaluation, which slides by half
      the latents; its sliding is the same.
    stride: bytes from one sliding window to the next; 0 takes `default_stride(config)`.

  Raises:
    ConfigError: the method or stride does not fit the model.
  """
  check_method(config, method, stride)
  if isinstance(config, PerceiverARConfig):
    return _latent_windows(document_length, config, stride or default_stride(config))
  step = (stride or default_stride(config)) if method in ("sliding", "both") else config.context
  windows = _sliding_windows(document_length, config.context, step)
  if method in ("strided", "both"):
    windows = _strided(windows, config.levels[0].patch_size)
  return windows


def check_method(config: ModelConfig, method: str, stride: int = 0) -> None:
  """Raises ConfigError unless the model can be evaluated by `method` with `stride`."""
  require(method in METHODS, f"method is {method!r}; choose one of {', '.join(METHODS)}")
  perceiver = isinstance(config, PerceiverARConfig)
  require(
    method in ("basic", "sliding") or (isinstance(config, MegabyteConfig) and config.levels[0].patch_size > 1),
    f"method={method} shifts patches, but this model's first level reads single bytes; take basic or sliding",
  )
  require(
    stride == 0 or perceiver or method in ("sliding", "both"),
    f"stride is {stride}, but method={method} does not slide; leave it 0 or take method=sliding or both",
  )
  if isinstance(config, PerceiverARConfig):
    limit, name = config.latents, "model.latents"
  else:
    limit, name = config.context, "model.context"
  require(0 <= stride <= limit, f"stride is {stride}; it must be between 1 and {name} ({limit}), or 0 for half of it")


def default_stride(config: ModelConfig) -> int:
  """Returns half the context in whole patches (spans, if `config.span` is set); for PerceiverAR half the latents."""
  if isinstance(config, PerceiverARConfig):
    return latent_stride(config.latents)
  unit = config.span or config.levels[0].patch_size
  return config.context // 2 // unit * unit or max(1, config.context // 2)


def cost_factor(method: str, config: ModelConfig, stride: int = 0) -> float:
  """Returns the compute relative to reading each byte once: 1, 2, 2, 4 (Table 11) at the default stride.

  The factor is nominal: documents are assumed to be much longer than the context. A document that fits into the context
  is read once at any stride. For PerceiverAR it is the number of latents per byte scored: 2 at its default stride.

  Raises:
    ConfigError: the method or stride does not fit the model.
  """
  check_method(config, method, stride)
  if isinstance(config, PerceiverARConfig):
    return config.latents / (stride or default_stride(config))
  slide = config.context / (stride or default_stride(config)) if method in ("sliding", "both") else 1.0
  return slide * (2.0 if method in ("strided", "both") else 1.0)


def window_start(position: int, config: ModelConfig) -> int:
  """Returns the start of the window that predicts byte `position` in generation; for PerceiverAR that of its latents.

  A full window moves by half (in whole patches) and reads the kept half again. Each byte thus has the probability that
  `windows_of` with method=sliding gives it. PerceiverAR's latents move by half their number when they are full, as in
  its evaluation; its window starts at `latents_window`.
  """
  size = config.latents if isinstance(config, PerceiverARConfig) else config.context
  stride = default_stride(config)
  return max(0, -(-(position + 1 - size) // stride)) * stride


def latents_window(latents_start: int, config: PerceiverARConfig) -> int:
  """Returns the start of the window whose full set of latents starts at `latents_start`."""
  return max(0, latents_start + config.latents - config.context)


def generation_window(position: int, config: ModelConfig) -> tuple[int, int, int]:
  """Returns (start, capacity in bytes, PerceiverAR's latent start in it) of the window that generates `position`."""
  start = window_start(position, config)
  if not isinstance(config, PerceiverARConfig):
    return start, config.context, 0
  window = latents_window(start, config)
  return window, start - window + config.latents, start - window


def _sliding_windows(document_length: int, context: int, stride: int) -> Iterator[Window]:
  """Yields windows of `context` bytes at multiples of `stride`; each scores what the previous one did not reach."""
  scored, start = 0, 0
  while scored < document_length:
    length = min(context, document_length - start)
    yield Window(start, length, scored - start, length)
    scored, start = start + length, start + stride


def _latent_windows(document_length: int, config: PerceiverARConfig, stride: int) -> Iterator[Window]:
  """Yields a first window of latents only; then the latents move by `stride` and the prefix grows to the context."""
  scored, latents = 0, 0
  while scored < document_length:
    start = latents_window(latents, config)
    length = min(latents + config.latents, document_length) - start
    yield Window(start, length, scored - start, length, latent_start=latents - start)
    scored, latents = start + length, latents + stride


def _strided(windows: Iterator[Window], patch: int) -> Iterator[Window]:
  """Yields each window as pass A and as pass B, whose patches start floor(patch / 2) bytes later.

  Pass A keeps floor(patch / 2) positions of a patch and pass B the rest. A scores the whole first patch of a window,
  because B does not see its first half.
  """
  half = patch // 2
  for w in windows:
    a = dataclasses.replace(w, patch=patch, kept=half, whole=patch)
    b_from = max(w.score_from, patch) - half
    b = Window(w.start + half, w.length - half, b_from, w.score_to - half, patch=patch, kept=patch - half)
    yield from (window for window in (a, b) if scored_mask(window).any())
