"""Describes a stack of decoder blocks (`Level`) and what all blocks of a model share (`BlockOptions`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from megabyte_jax.config.parsing import convert_fields
from megabyte_jax.errors import require

Remat = Literal["none", "full", "named"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
  """Describes one causal decoder of the hierarchy (level i of n; section 2.2 of the paper has n = 2).

  Attributes:
    patch_size: S_i, the bytes that one slot of this level stands for.
    width: D_i = S_i * d_i, the Transformer's width; d_i is the width of one byte's embedding.
    num_layers: decoder blocks.
    num_heads: attention heads.
    head_dim: width of a head; 0 takes width / num_heads.
    ff_width: hidden width of the feed-forward layers; 0 takes the usual one, see `BlockOptions.hidden`.
    rotary: rotary relative positions on queries and keys, on top of the learned byte positions.
    cross_patch: r, the slots of the previous span whose keys and values each layer also sees
      (section 2.3.2); needs `rotary` for positions relative to the previous span.
    conv_filters: filter sizes of the causal convolutional patch encoder (section 2.3.1): (3, 5, 7) in the paper.
    attention_window: a slot sees itself and the `attention_window - 1` slots before it; 0 sees all.
  """

  patch_size: int
  width: int
  num_layers: int
  num_heads: int
  head_dim: int = 0
  ff_width: int = 0
  rotary: bool = False
  cross_patch: int = 0
  conv_filters: tuple[int, ...] = ()
  attention_window: int = 0

  def __post_init__(self):
    convert_fields(self)

  @property
  def byte_width(self) -> int:
    """d_i, the width of one byte's embedding (D_G for the global model, D_L for the local one)."""
    return self.width // self.patch_size

  @property
  def heads(self) -> tuple[int, int]:
    """(number of heads, width of one)."""
    return self.num_heads, self.head_dim or self.width // self.num_heads

  def check(self, where: str, span: int, *, has_previous_span: bool) -> None:
    """Raises ConfigError unless this level works on spans of `span` bytes."""
    for name in ("patch_size", "width", "num_layers", "num_heads"):
      require(getattr(self, name) > 0, f"{where}.{name} is {getattr(self, name)}; it must be at least 1")
    for name in ("head_dim", "ff_width", "cross_patch", "attention_window"):
      require(getattr(self, name) >= 0, f"{where}.{name} is {getattr(self, name)}; it must not be negative")
    down = self.width // self.patch_size * self.patch_size
    require(
      self.width % self.patch_size == 0,
      f"{where}.width {self.width} is not a multiple of patch_size {self.patch_size} (a slot is the concatenation of "
      f"{self.patch_size} byte embeddings); take {down or self.patch_size} or {down + self.patch_size}",
    )
    require(
      self.head_dim > 0 or self.width % self.num_heads == 0,
      f"{where}.width {self.width} is not a multiple of num_heads {self.num_heads}; set {where}.head_dim",
    )
    require(
      span % self.patch_size == 0,
      f"{where}.patch_size {self.patch_size} does not divide the {span} bytes of its span "
      "(the patch size of the level above, the context for the first)",
    )
    slots = span // self.patch_size
    require(
      not (self.rotary or self.cross_patch) or self.heads[1] % 2 == 0,
      f"{where}.head_dim {self.heads[1]} is odd; rotary positions need an even one",
    )
    require(
      self.cross_patch == 0 or has_previous_span,
      f"{where}.cross_patch is {self.cross_patch}, but the first level has no previous span; set it to 0",
    )
    require(
      self.cross_patch <= slots,
      f"{where}.cross_patch {self.cross_patch} is more than the {slots} slots of a span",
    )
    require(
      self.cross_patch == 0 or self.rotary,
      f"{where}.cross_patch needs {where}.rotary=True: learned positions do not reach into the previous span",
    )
    require(
      self.attention_window == 0 or self.cross_patch == 0,
      f"{where}: attention_window and cross_patch exclude each other; set one to 0",
    )
    require(
      all(f > 0 for f in self.conv_filters), f"{where}.conv_filters {self.conv_filters}: sizes must be at least 1"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
  """Holds the options that all decoder blocks of a model share. Defaults are the paper's (appendix A.1).

  Attributes:
    norm: layernorm | rmsnorm, always before attention and feed-forward and once after the last block.
    activation: relu | gelu | silu | swiglu (silu of one half of the feed-forward's inner units times the other half).
    bias: biases in norms, projections and feed-forward layers.
    qk_norm: RMSNorm of every head's queries and keys, with learned scales, before rotary positions.
    dropout: on the output of every attention and feed-forward layer; never on embeddings.
    attention_dropout: on attention probabilities; only the xla attention can do it.
    init: how matrices are drawn: paper (from a normal cut at two deviations; its deviation is init_std, divided by the
      root of the number of residual branches for what these end with) | fan_in (from a normal that is not cut; its
      deviation is one over the root of the number of inputs).
    init_std: standard deviation of the normal (cut at two of them) that parameters are drawn from.
    embedding_std: that of the normal, not cut, for byte tables, positions and pads; 0 draws them with init_std.
    tied_output: logits are products with the byte table, eq. (6); False: with a matrix of their own.
    logit_scale: what logits are multiplied by: one | width (one over the root of the width, so that logits from a byte
      table of deviation 1 begin with about 1).
    remat: what backward recomputes: none | full (each block) | named (all but q, k and v, what attention gives, and the
      hidden layer; where `mesh.tensor` spreads heads also the sum after self-attention, which would be sent again).
    compute_dtype: auto | bfloat16 | float32; auto is float32 on CPU and bfloat16 elsewhere. Products of float32 are as
      precise as JAX's default_matmul_precision: on GPUs and TPUs less than float32, unless that is "highest".
    scan_layers: always | never | auto: whether one compiled block serves all layers of a level, or each is compiled by
      itself, which is faster but, with remat=named, keeps more activations; auto is never on a GPU, always elsewhere.
    attention: auto | xla | cudnn | splash, see models/layers/attention.py; xla does without all kernels.
  """

  norm: Literal["layernorm", "rmsnorm"] = "layernorm"
  activation: Literal["relu", "gelu", "silu", "swiglu"] = "relu"
  bias: bool = True
  qk_norm: bool = False
  dropout: float = 0.1
  attention_dropout: float = 0.0
  init: Literal["paper", "fan_in"] = "paper"
  init_std: float = 0.006
  embedding_std: float = 0.0
  tied_output: bool = True
  logit_scale: Literal["one", "width"] = "one"
  remat: Remat = "none"
  scan_layers: Literal["auto", "always", "never"] = "auto"
  compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
  attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"

  @property
  def gated(self) -> bool:
    """True if the feed-forward layers have two inner halves."""
    return self.activation == "swiglu"

  def hidden(self, level: Level) -> int:
    """Returns the width of a level's feed-forward hidden layer, of one half if gated.

    Without `ff_width` 4 * width; if gated 8/3 of the width, for as many parameters in three matrices as the others have
    in two, to the nearest multiple of 128 (of 8 below a width of 384).
    """
    if level.ff_width or not self.gated:
      return level.ff_width or 4 * level.width
    unit = 128 if level.width >= 384 else 8
    return max(1, round(8 * level.width / (3 * unit))) * unit

  def check_options(self) -> None:
    """Raises ConfigError for impossible values."""
    for name in ("dropout", "attention_dropout"):
      require(0 <= getattr(self, name) < 1, f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")
    require(0 < self.init_std < math.inf, f"model.init_std is {self.init_std}; it must be positive and finite")
    std = self.embedding_std
    require(0 <= std < math.inf, f"model.embedding_std is {std}; it must not be negative or infinite")
    require(
      self.attention_dropout == 0 or self.attention in ("auto", "xla"),
      f"model.attention_dropout needs model.attention=xla, not {self.attention}",
    )
