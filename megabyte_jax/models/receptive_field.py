"""Works out from the configuration alone which bytes each prediction may depend on; the notebook draws it.

Only sets are tracked: which bytes enter which slot, and which slots see which. No model is run, so that
what a model really reads can be held against it.
"""

from __future__ import annotations

import numpy as np

from megabyte_jax.config import Level, ModelConfig


def receptive_field(config: ModelConfig) -> np.ndarray:
  """Returns True at (t, s) where the logits of byte t depend on byte s, for an input as long as the context.

  Two levels (P, 1), or (1,) alone: all earlier bytes. Levels (P,): the bytes of earlier patches. A level
  (1,) with a span: the earlier bytes of the own span; with cross-patch attention each layer reaches one
  span further back, but never to the last byte of a span, which is the input of no slot.

  Returns:
    bool [T, T]; for PerceiverAR [N, T], one row for each latent at the end of the context. The work grows
    with T^3: this is for small models.
  """
  T = config.context
  if N := config.num_latents:
    [level] = config.levels
    latents = _compose(np.tri(T, dtype=bool)[T - N :], _input_slots(level, T, T))
    return _through_layers(latents, np.tri(N, dtype=bool), level.num_layers)
  outputs = np.zeros((1, T), bool)  # of the parent; the first level has none
  for level, span in zip(config.levels, config.spans, strict=True):
    slots = _input_slots(level, span, T)
    slots |= np.repeat(outputs, len(slots) // len(outputs), axis=0)  # each is given its slice of the parent's output
    outputs = _through_layers(slots, _visible_slots(level, span, T), level.num_layers)
  return np.repeat(outputs, config.levels[-1].patch_size, axis=0)


def _compose(sees: np.ndarray, contains: np.ndarray) -> np.ndarray:
  """Returns what is contained in anything that is seen."""
  return (sees.astype(np.int32) @ contains.astype(np.int32)) > 0


def _input_slots(level: Level, span: int, T: int) -> np.ndarray:
  """bool [T / S, T]: the bytes in the input of each slot, the parent's output left out."""
  t, s = np.arange(T)[:, None], np.arange(T)[None, :]
  reach = sum(size - 1 for size in level.conv_filters)
  embedded = (t // span == s // span) & (s <= t) & (t - s <= reach)
  elements = embedded.reshape(T // level.patch_size, level.patch_size, T).any(axis=1)
  slots = np.roll(elements, 1, axis=0)
  slots[:: span // level.patch_size] = False  # the first slot of a span is the pad
  return slots


def _visible_slots(level: Level, span: int, T: int) -> np.ndarray:
  """bool [T / S, T / S]: the slots that each slot sees in one layer."""
  M = span // level.patch_size
  query, key = np.arange(T // level.patch_size)[:, None], np.arange(T // level.patch_size)[None, :]
  own = (query // M == key // M) & (key <= query) & (query - key < (level.attention_window or M))
  end_of_previous = (query // M == key // M + 1) & (key % M >= M - level.cross_patch)
  return own | end_of_previous


def _through_layers(slots: np.ndarray, visible: np.ndarray, num_layers: int) -> np.ndarray:
  for _ in range(num_layers):
    slots = _compose(visible, slots)
  return slots
