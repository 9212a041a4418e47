"""Describes the Block-Recurrent Transformer (arXiv 2203.07852); the model is models/block_recurrent.py."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, Self

from megabyte_jax.config.counts import attention_width, block_weights, norm_parameters, output_parameters
from megabyte_jax.config.levels import Level
from megabyte_jax.config.model import Attention, MemoryTraffic, ModelConfig
from megabyte_jax.config.one_level import OneLevel
from megabyte_jax.errors import require

BUCKETS = 32  # of T5's relative positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockRecurrentConfig(OneLevel, ModelConfig):
  """Describes a Transformer with a sliding window, some of whose layers also carry state vectors over the windows.

  Attributes:
    context: T, the tokens of a segment, whole windows: 4,096 in the paper. Gradients stop at its beginning.
    vocab_size: as in `ModelConfig`.
    window: W, the tokens that a token sees, itself included, and after which the states change.
    states: S, the state vectors of a recurrent layer.
    recurrent_layers: numbers of the recurrent layers; negative ones count from the end. The paper's 12 layers have
      their third from the end, its 24 layers have 9 and 19.
    gate: fixed (a learned constant) | lstm (an input and a forget gate); see layers/recurrent_cell.py.
    skip: leaves the feed-forward layer of the states out, the paper's best choice.
    width, num_layers, num_heads, head_dim, ff_width: as in `Level`.
  """

  largest_vocab = 1 << 20

  family: Literal["block_recurrent"] = "block_recurrent"
  window: int = 512
  states: int = 512
  recurrent_layers: tuple[int, ...] = (-3,)
  gate: Literal["fixed", "lstm"] = "fixed"
  skip: bool = True
  width: int
  num_layers: int
  num_heads: int
  head_dim: int = 0
  ff_width: int = 0

  @property
  def display_name(self) -> str:
    """Block-Recurrent Transformer."""
    return "Block-Recurrent Transformer"

  @property
  def recurrent(self) -> bool:
    """True: a memory goes from segment to segment."""
    return True

  @property
  def level_names(self) -> tuple[str, ...]:
    """The layers over tokens, as the cells work on states."""
    return ("tokens",)

  @property
  def cells(self) -> tuple[int, ...]:
    """Numbers of the recurrent layers, from 0, in their order."""
    return tuple(sorted(i % self.num_layers for i in self.recurrent_layers))

  @property
  def runs(self) -> tuple[tuple[int, int, int | None], ...]:
    """(first layer, layer after the last, cell) of the layers in order: runs without a cell, or one layer with it."""
    found: list[tuple[int, int, int | None]] = []
    start = 0
    for number, layer in enumerate(self.cells):
      found += [(start, layer, None), (layer, layer + 1, number)]
      start = layer + 1
    found.append((start, self.num_layers, None))
    return tuple(run for run in found if run[0] < run[1])

  @property
  def groups(self) -> tuple[tuple[int, int, int, int], ...]:
    """(first layer, layers before each cell, first cell, cells) of the recurrent layers, grouped by equal distances.

    The paper's 24 layers are twice nine layers and a recurrent one, and then four: what is equal is compiled once.
    """
    before = [layer - earlier - 1 for earlier, layer in zip((-1, *self.cells), self.cells, strict=False)]
    found, first = [], 0
    for run, group in itertools.groupby(before):
      count = len(list(group))
      found.append((self.cells[first] - run, run, first, count))
      first += count
    return tuple(found)

  def with_levels(self, levels: tuple[Level, ...]) -> Self:
    """Returns the same model with other sizes of its only level.

    Where there are too few layers for the recurrent ones, these move to the same shares of the depth.
    """
    sizes = self.sizes_of(levels)
    layers, now = self.recurrent_layers, sizes["num_layers"]
    if not all(-now <= i < now for i in layers):
      layers = tuple(dict.fromkeys(i * now // self.num_layers for i in self.cells))
    return dataclasses.replace(self, recurrent_layers=layers, **sizes)

  # --- Counts. Queries, keys and values have no biases. ---

  def parameter_count(self) -> int:
    """Returns the number of trainable parameters."""
    level, norm = self.level, norm_parameters(self, self.width)
    heads, hidden = attention_width(level), (1 + self.gated) * self.hidden(level)
    biases = (2 * self.width + hidden) * self.bias
    layer = block_weights(self, level) + biases + 2 * norm + (BUCKETS + 1) * self.num_heads  # + 1: scales
    gates = 1 if self.gate == "fixed" else 3

    def gate(inputs):
      return self.width * (gates * inputs + self.bias + max(1, gates - 1))  # with b_g, or b_i and b_f

    cell = 2 * self.width * heads + 3 * self.num_heads  # the tokens' side; scales
    cell += norm + 2 * self.states * self.width + 4 * self.width * heads + gate(2 * heads)
    if not self.skip:
      cell += norm + hidden * (self.width + self.bias) + gate(self.hidden(level))
    embeddings = (self.vocab_size + 1) * self.width  # + 1: the pad
    embeddings += output_parameters(self, self.vocab_size, self.width)
    return embeddings + self.num_layers * layer + len(self.cells) * cell + norm

  def flops_breakdown(self, attention: Attention) -> dict[str, float]:
    """Returns the forward operations per token of a segment that others have come before, by parts."""
    level, cells = self.level, len(self.cells)
    heads, keys = attention_width(level), 2 * self.window if attention == "dense" else self.window
    gates = 1 if self.gate == "fixed" else 3
    of_state = (4 + 2 * gates) * self.width * heads
    if not self.skip:
      of_state += (1 + self.gated + gates) * self.width * self.hidden(level)
    share = self.states / self.window  # state vectors per token
    return {
      "levels[0].weights": 2 * self.num_layers * block_weights(self, level),
      "levels[0].attention": 4 * self.num_layers * keys * heads,
      "cells.weights": 2 * cells * (2 * self.width * heads + share * of_state),
      "cells.attention": 4 * cells * heads * (self.states + share * (self.states + 2 * self.window)),
      "head": 2 * self.vocab_size * self.width,
    }

  @property
  def memory_traffic(self) -> MemoryTraffic:
    """Counts scores of two windows for a token, and of states; the remembered window's keys and values; the states.

    For each window the states (float32: twice) are read and written, and their keys, values and queries, too.
    """
    cells, heads, windows = len(self.cells), attention_width(self.level), self.context // self.window
    of_tokens = self.context * (2 * self.window * self.num_layers + self.states * cells)
    of_states = windows * self.states * (self.states + 2 * self.window) * cells
    of_window = self.num_layers * 4 * self.window * heads
    of_cells = cells * windows * self.states * (4 * self.width + 8 * heads)
    return MemoryTraffic(self.num_heads * (of_tokens + of_states), of_window + of_cells)

  def __post_init__(self):
    self.check_sizes()
    for name in ("window", "states"):
      require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be at least 1")
    require(
      self.context % self.window == 0,
      f"model.context {self.context} is not a multiple of model.window {self.window}; a segment is whole windows",
    )
    self.level.check(self.level_key(0), self.context, has_previous_span=False)
    layers = self.num_layers
    require(len(self.recurrent_layers) > 0, "model.recurrent_layers is empty; give at least one layer")
    require(
      all(-layers <= i < layers for i in self.recurrent_layers) and len(set(self.cells)) == len(self.recurrent_layers),
      f"model.recurrent_layers is {self.recurrent_layers}; give different ones of the {layers} layers, from "
      f"{-layers} to {layers - 1}",
    )
    require(not self.qk_norm, "model.qk_norm is True, but this family has its own norm of queries and keys; set False")
    require(
      self.attention in ("auto", "xla"),
      f"model.attention={self.attention} cannot serve here: it has no relative positions; take model.attention=auto",
    )
