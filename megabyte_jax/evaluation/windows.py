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
import sys
from collections.abc import Iterator
from typing import get_args

import numpy as np

from megabyte_jax.config import ModelConfig
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
    stride: bytes from one sliding window to the next; 0 takes `config.default_stride`.

  Raises:
    ConfigError: the method or stride does not fit the model.
  """
  check_method(config, method, stride)
  step = (stride or config.default_stride) if _slides(config, method) else config.context
  windows = _moving_windows(document_length, config, step)
  return _strided(windows, config.patch_bytes) if method in ("strided", "both") else windows


def _slides(config: ModelConfig, method: str) -> bool:
  return config.num_latents > 0 or method in ("sliding", "both")


def check_method(config: ModelConfig, method: str, stride: int = 0) -> None:
  """Raises ConfigError unless the model can be evaluated by `method` with `stride`."""
  require(method in METHODS, f"method is {method!r}; choose one of {', '.join(METHODS)}")
  require(
    method == "basic" or not config.recurrent,
    f"method={method} reads bytes again, but {config.display_name} remembers those before a segment; take method=basic",
  )
  require(
    method in ("basic", "sliding") or config.patch_bytes > 1,
    f"method={method} shifts patches, but this model's first level reads single bytes; take basic or sliding",
  )
  require(
    stride == 0 or _slides(config, method),
    f"stride is {stride}, but method={method} does not slide; leave it 0 or take method=sliding or both",
  )
  limit, name = config.predicted_bytes, "model.latents" if config.num_latents else "model.context"
  require(0 <= stride <= limit, f"stride is {stride}; it must be between 1 and {name} ({limit}), or 0 for half of it")


def cost_factor(method: str, config: ModelConfig, stride: int = 0) -> float:
  """Returns the compute relative to reading each byte once: 1, 2, 2, 4 (Table 11) at the default stride.

  The factor is nominal: documents are assumed to be much longer than the context. A document that fits into the context
  is read once at any stride. For PerceiverAR it is the number of latents per byte scored: 2 at its default stride.

  Raises:
    ConfigError: the method or stride does not fit the model.
  """
  check_method(config, method, stride)
  slide = config.predicted_bytes / (stride or config.default_stride) if _slides(config, method) else 1.0
  return slide * (2.0 if method in ("strided", "both") else 1.0)


def window_start(position: int, config: ModelConfig) -> int:
  """Returns the start of the window that predicts byte `position` in generation; for PerceiverAR that of its latents.

  A full window moves by half (in whole patches) and reads the kept half again. Each byte thus has the probability that
  `windows_of` with method=sliding gives it. PerceiverAR's latents move by half their number when they are full, as in
  its evaluation; its window starts at `latents_window`.
  """
  stride = config.default_stride
  return max(0, -(-(position + 1 - config.predicted_bytes) // stride)) * stride


def latents_window(latents_start: int, config: ModelConfig) -> int:
  """Returns the start of the window whose predicted bytes (latents, or all) start at byte `latents_start`."""
  return max(0, latents_start + config.predicted_bytes - config.context)


def generation_window(position: int, config: ModelConfig) -> tuple[int, int, int]:
  """Returns where byte `position` is generated.

  A recurrent model reads a text from its beginning and goes on without end.

  Returns:
    The window's start in the text; the bytes that it can hold; where the latents start in it, or 0.
  """
  if config.recurrent:
    return 0, sys.maxsize, 0
  predicted = window_start(position, config)
  start = latents_window(predicted, config)
  return start, predicted - start + config.predicted_bytes, predicted - start


def _moving_windows(document_length: int, config: ModelConfig, stride: int) -> Iterator[Window]:
  """Yields windows whose predicted bytes move by `stride`; each scores what the one before did not reach.

  Without latents a window predicts all of its bytes. With latents the first window has nothing else; then the prefix
  grows up to the context.
  """
  scored, predicted = 0, 0
  while scored < document_length:
    start = latents_window(predicted, config)
    length = min(predicted + config.predicted_bytes, document_length) - start
    yield Window(start, length, scored - start, length, latent_start=predicted - start)
    scored, predicted = start + length, predicted + stride


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
