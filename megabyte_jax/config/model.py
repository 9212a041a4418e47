"""Defines what every family of models answers about itself; all other rooms ask a config rather than its class.

A new family is a subclass of `ModelConfig` in a file of its own: CONTRIBUTING.md, "Adding a model family".
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import numpy as np

from megabyte_jax.config.levels import BlockOptions, Level
from megabyte_jax.config.parsing import convert_fields
from megabyte_jax.errors import require

Attention = Literal["causal", "dense", "whole"]  # which products of attention count, see models/flops.py


def latent_stride(latents: int) -> int:
  """Returns the bytes from one window to the next where only the last `latents` bytes are predicted: half of them."""
  return max(1, latents // 2)


class CrossAttention(NamedTuple):
  """Sizes of a layer that looks over the whole input, beside the levels' blocks.

  Attributes:
    queries: slots that look.
    keys: slots that one of them sees on average.
    heads: attention heads.
    width: of a slot.
  """

  queries: int
  keys: float
  heads: int
  width: int


class MemoryTraffic(NamedTuple):
  """Counts what a forward pass over a row's segment has in HBM because of its attention to a memory, in all layers.

  Attributes:
    scores: float32 products of queries with keys or distances, each written once and read once.
    numbers: bfloat16 numbers written or read: the memory itself, its keys and values, and what states need.
  """

  scores: float
  numbers: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(BlockOptions, abc.ABC):
  """Describes a model of any family: its sizes, and how it reads, predicts, decodes and is spread over devices.

  Subclasses set `family`, a `Literal` that names the class in config files, and have `levels` as a field or property.

  Attributes:
    context: T, the longest input in bytes; in tokens, where it reads subwords, as all other lengths are then.
    vocab_size: values of a byte, all of them counted (tests use fewer); of subwords the size of their tokenizer.
  """

  default_family: ClassVar[str] = "megabyte"  # of a config that names none
  largest_vocab: ClassVar[int] = 256  # a family that reads tokens rather than bytes allows more

  family: str
  context: int
  vocab_size: int = 256

  if TYPE_CHECKING:  # a property here would be taken for the default of a field of this name

    @property
    def levels(self) -> tuple[Level, ...]:
      """Sizes of every stack of blocks, from the coarsest to the finest."""
      ...

  def check_sizes(self) -> None:
    """Raises ConfigError for impossible options, context or vocabulary; subclasses call it first."""
    convert_fields(self)
    self.check_options()
    require(self.context > 0, f"model.context is {self.context}; it must be at least 1")
    largest = self.largest_vocab
    require(
      1 <= self.vocab_size <= largest,
      f"model.vocab_size is {self.vocab_size}; "
      + (f"bytes have 1 to {largest} values" if largest == 256 else f"it must be between 1 and {largest:,}"),
    )

  @property
  def reads_tokens(self) -> bool:
    """True if the model may read subwords instead of bytes."""
    return self.largest_vocab > 256

  # --- Names. ---

  @property
  @abc.abstractmethod
  def display_name(self) -> str:
    """The model's name in tables for people."""

  def level_key(self, i: int) -> str:
    """Returns the key under which the sizes of level i are set, such as `model.levels[1]`."""
    return f"model.levels[{i}]"

  @property
  def level_names(self) -> tuple[str, ...]:
    """The levels' names for people."""
    return tuple(f"level {i}" for i in range(1, len(self.levels) + 1))

  # --- What a window is, in training, evaluation and generation; see evaluation/windows.py. ---

  @property
  def num_latents(self) -> int:
    """Bytes at a window's end that alone are predicted, in windows that overlap by half of them; 0 predicts all."""
    return 0

  @property
  def predicted_bytes(self) -> int:
    """Bytes that a full window predicts."""
    return self.num_latents or self.context

  def shortened(self, length: int) -> Self:
    """Returns the config for windows of at most `length` bytes; the same one where a family needs its whole context.

    Its parameters are the first rows of this one's; the probabilities of such windows are the same.
    """
    return self

  @property
  def default_stride(self) -> int:
    """Bytes from one overlapping window to the next: half of those that a window predicts."""
    return latent_stride(self.predicted_bytes)

  @property
  def alignment(self) -> int:
    """Bytes that belong together: inputs are padded to whole multiples."""
    return 1

  @property
  def patch_bytes(self) -> int:
    """Bytes of a patch: decoding makes so many at once, and strided evaluation shifts windows by half of them."""
    return 1

  @property
  def recurrent(self) -> bool:
    """True if the model has a memory across windows, which then are consecutive segments of `context` tokens."""
    return False

  @property
  def for_evaluation(self) -> Self:
    """The same parameters as evaluation and generation use them, such as with a longer memory."""
    return self

  # --- What a window costs. ---

  @property
  @abc.abstractmethod
  def spans(self) -> tuple[int, ...]:
    """Bytes per span of each level: those that its attention sees together."""

  @property
  def slots(self) -> tuple[int, ...]:
    """Slots of a full window that each level works on, all spans together."""
    return tuple(self.context // level.patch_size for level in self.levels)

  @property
  def attention_shapes(self) -> tuple[tuple[int, int], ...]:
    """Spans that each level's attention works on together, and the slots of one, in training."""
    lengths = [span // level.patch_size for level, span in zip(self.levels, self.spans, strict=True)]
    return tuple((slots // length, length) for slots, length in zip(self.slots, lengths, strict=True))

  @property
  def cross_attention(self) -> CrossAttention | None:
    """A layer beside those of the levels, if there is one."""
    return None

  @property
  def memory_traffic(self) -> MemoryTraffic | None:
    """Counts what attention to a memory across windows moves; None in families that have no such memory."""
    return None

  @abc.abstractmethod
  def parameter_count(self) -> int:
    """Returns the number of trainable parameters: tables, positions, pads, biases and norms included."""

  @abc.abstractmethod
  def flops_breakdown(self, attention: Attention) -> dict[str, float]:
    """Returns the forward operations per predicted byte, by parts such as `levels[0].weights` and `head`."""

  @property
  def stopped_flops(self) -> float:
    """Operations per predicted byte that a backward pass has not, as gradients stop before them.

    Without them, training is three times the forward pass.
    """
    return 0.0

  # --- Other sizes of the same model. ---

  @abc.abstractmethod
  def with_levels(self, levels: tuple[Level, ...]) -> Self:
    """Returns the same model with other sizes of its levels, as many as it has.

    Raises:
      ConfigError: the sizes do not suit each other.
    """

  def with_layers(self, layers: int, level: int = -1) -> Self:
    """Returns the same model with another number of layers in one level; -1 is the finest."""
    levels = list(self.levels)
    levels[level] = dataclasses.replace(levels[level], num_layers=layers)
    return self.with_levels(tuple(levels))

  # --- Meshes. ---

  @property
  def sequence_parts(self) -> int:
    """Parts that a sequence can be spread over (the mesh's axis `seq` divides them); 0 if it cannot be."""
    return 0


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns the smallest unsigned integers that hold the values of a vocabulary."""
  return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def check_bytes(x: np.ndarray, vocab_size: int) -> None:
  """Raises ConfigError where a number of x is not among the bytes that a model of so many values knows."""
  if not x.size or (x.dtype == np.uint8 and vocab_size == 256):
    return
  for extreme in (int(x.max()), int(x.min())):
    require(
      0 <= extreme < vocab_size,
      f"the model knows only {'bytes' if vocab_size <= 256 else 'tokens'} below {vocab_size} (model.vocab_size); "
      f"the data have {extreme}",
    )
