"""Defines everything that can be set, as frozen dataclasses.

A file in configs/ builds a `Config` and returns `config.to_config_dict()`, so that every field can be
overridden on the command line (`--config.batch_size=4`, `--config.model.levels[0].num_layers=3`).
`Config.from_dict` turns the result back into dataclasses; a typo, a wrong type or an impossible size
is one `ConfigError` that names the key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from megabyte_jax.config.model import ModelConfig
from megabyte_jax.config.parsing import convert_fields, dataclass_from_mapping, mapping_from_dataclass
from megabyte_jax.errors import require

Scan = Literal["patch", "raster"]
Method = Literal["basic", "sliding", "strided", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Settings of the data; see data/open_data.py for the names of sources.

  Attributes:
    train, validation, test: a file, a folder, a glob, `sample:NAME` (data shipped with the package),
      `tfds:NAME:SPLIT` or `hf:NAME:SPLIT`; several are separated by commas. Empty where a split does not exist.
    train_weights: share of each comma-separated source of `train`; empty weighs them by their bytes.
    form: how items become bytes: bytes (as they are) | image | audio; or subwords: texts, cut by a tokenizer.
    tokenizer: of subwords, a SentencePiece model (see `prepare tokenizer`).
    tokenizer_sha256: the checksum that its file must have; '' takes any, and training writes it down.
    documents: packed (windows are cut from all documents joined end to end) | whole (no window crosses
      from one document into the next). Recurrent models read whole documents in any case.
    image_size: images are scaled (short side) and centre-cropped to this many pixels squared.
    image_tiles: 0 takes the centred square of an image; else the short side is scaled to this many pixels and the
      image is cut into disjoint tiles of image_size pixels squared.
    max_pixels: images of more pixels are unreadable: a small file may hold as many as fill the memory.
    convert_images: make grey, alpha, CMYK and 16-bit images RGB instead of calling them unreadable.
    scan: order of an image's bytes: patch (section D.1 of the paper) | raster.
    scan_patch: bytes P = 3 * p^2 of a p x p patch in a patch scan.
    sample_rate: audio is resampled to this many samples per second; 0 keeps the file's own.
    encoding: audio bytes: pcm16 (16-bit little-endian, the paper's) | mulaw8.
    tfds_dir: where TFDS data sets lie; empty takes TFDS's own default.
    skip_bad: skip (and count) unreadable items instead of stopping.
    raw: take the bytes of all files as they are, those of compressed files and of records, too.
    cache_dir: where indexes of records and copies of compressed files are kept; empty takes megabyte_jax in
      $XDG_CACHE_HOME or ~/.cache.
  """

  train: str = "sample:text/train"
  validation: str = "sample:text/validation"
  test: str = ""
  train_weights: tuple[float, ...] = ()
  form: Literal["bytes", "image", "audio", "subwords"] = "bytes"
  tokenizer: str = ""
  tokenizer_sha256: str = ""
  documents: Literal["packed", "whole"] = "packed"
  image_size: int = 64
  image_tiles: int = 0
  max_pixels: int = 178_956_970
  convert_images: bool = False
  scan: Scan = "patch"
  scan_patch: int = 12
  sample_rate: int = 0
  encoding: Literal["pcm16", "mulaw8"] = "pcm16"
  tfds_dir: str = ""
  skip_bad: bool = False
  raw: bool = False
  cache_dir: str = ""

  def __post_init__(self):
    convert_fields(self)
    require(self.image_size > 0, f"data.image_size is {self.image_size}; it must be at least 1")
    require(self.max_pixels > 0, f"data.max_pixels is {self.max_pixels}; it must be at least 1")
    for name in ("image_tiles", "sample_rate"):
      require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; it must not be negative")
    require(
      self.form != "subwords" or self.tokenizer != "",
      "data.form=subwords needs data.tokenizer, a file that `python -m megabyte_jax prepare tokenizer` makes",
    )
    require(
      self.form == "subwords" or self.tokenizer == "",
      f"data.tokenizer is {self.tokenizer}, but data.form is {self.form}; set it to subwords, or leave the other empty",
    )

  @property
  def unit(self) -> str:
    """Returns the name of what a model reads: byte or token."""
    return "token" if self.form == "subwords" else "byte"

  @property
  def windows_may_be_short(self) -> bool:
    """True if a window of training may end with its document, before the context does. Images are always whole."""
    return self.documents == "whole" or self.form == "image"

  def source(self, split: str) -> str:
    """Returns the source named for `split`; raises ConfigError where there is none."""
    require(split in ("train", "validation", "test"), f"split {split!r} is unknown; take train, validation or test")
    require(bool(getattr(self, split)), f"config.data.{split} is empty; name a file, folder or data set there")
    return getattr(self, split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Settings of the optimizer; defaults are the paper's (appendix A.1). See training/optimizer.py.

  Attributes:
    name: adamw | muon (matrices by Muon, everything else and an output of its own by AdamW).
    schedule: after a linear warm-up: linear | cosine | half_cosine (the first quarter of a cosine's period, which falls
      late), all three to the end of the run | wsd (constant, and linear over the last `decay_share` of the steps) |
      constant. With the last two num_steps may change on resuming, before the decay.
    warmup_steps: the learning rate grows from 0, which the first step has, for so many steps, or for all of a shorter
      run.
    learning_rate: after the warm-up.
    end_learning_rate: what all but constant end at.
    matrix_rate: of matrices (the output's own, too) and convolutions, relative to the rate: same | fan_in (divided by
      the root of their number of inputs, so that one learning rate serves all widths; for adamw).
    embedding_rate: of byte tables, positions and pads, as a factor.
    level_rates: of all parameters of each level, from the coarsest to the finest, as factors; empty has none.
    b1, b2: of AdamW, with either name.
    eps: of AdamW, and of the normalisation in Muon.
    momentum: of Muon.
    weight_decay: of all parameters, times the learning rate.
    clip_norm: gradients of a larger norm, over all parameters, are scaled down to it.
  """

  name: Literal["adamw", "muon"] = "adamw"
  learning_rate: float = 2e-4
  schedule: Literal["linear", "cosine", "half_cosine", "wsd", "constant"] = "linear"
  warmup_steps: int = 500
  end_learning_rate: float = 0.0
  matrix_rate: Literal["same", "fan_in"] = "same"
  embedding_rate: float = 1.0
  level_rates: tuple[float, ...] = ()
  decay_share: float = 0.2
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-8
  momentum: float = 0.95
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  @property
  def moments(self) -> int:
    """Float32 numbers kept for each parameter: two, or one for the matrices that Muon changes, which are nearly all."""
    return 1 if self.name == "muon" else 2

  def __post_init__(self):
    convert_fields(self)
    for name in ("learning_rate", "embedding_rate", "eps", "end_learning_rate", "weight_decay"):
      value = getattr(self, name)  # clip_norm=inf clips nothing
      require(math.isfinite(value), f"optimizer.{name} is {value}; it must be finite")
    for name in ("learning_rate", "embedding_rate", "eps", "clip_norm"):
      require(getattr(self, name) > 0, f"optimizer.{name} is {getattr(self, name)}; it must be positive")
    for name in ("b1", "b2", "momentum"):
      require(0 <= getattr(self, name) < 1, f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")
    require(
      all(rate > 0 for rate in self.level_rates),
      f"optimizer.level_rates is {self.level_rates}; each must be positive",
    )
    require(
      self.matrix_rate == "same" or self.name == "adamw",
      f"optimizer.matrix_rate={self.matrix_rate} is for adamw; the updates of {self.name} suit all widths as they are",
    )
    require(0 < self.decay_share <= 1, f"optimizer.decay_share is {self.decay_share}; it must be in (0, 1]")
    for name in ("warmup_steps", "end_learning_rate", "weight_decay"):
      require(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}; it must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices per mesh axis; one may be -1, which takes all that are left. See sharding.py."""

  data: int = -1
  fsdp: int = 1
  seq: int = 1
  tensor: int = 1

  def __post_init__(self):
    convert_fields(self)
    sizes = dataclasses.astuple(self)
    require(
      all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
      f"mesh sizes {sizes} must be at least 1, and at most one of them -1, which takes all devices that are left; "
      "they are those of data, fsdp, seq and tensor, so set one more of these, such as --config.mesh.seq=1",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When checkpoints are written and which are kept; the last step always is. 0 turns a rule off.

  Attributes:
    every_steps, every_minutes: save so often.
    keep: how many of the newest stay.
    keep_every_steps: those of every so many steps stay for good.
    keep_best: how many of those with the fewest validation bits per byte stay, of the evaluations during training
      (eval.every_steps), each of which then saves a checkpoint; `eval.py --step=best` takes the best of them.
  """

  every_steps: int = 1000
  every_minutes: float = 0.0
  keep: int = 2
  keep_every_steps: int = 0
  keep_best: int = 0

  def __post_init__(self):
    convert_fields(self)
    require(self.keep >= 1, f"checkpoint.keep is {self.keep}; keep at least 1")
    for name in ("every_steps", "every_minutes", "keep_every_steps", "keep_best"):
      require(getattr(self, name) >= 0, f"checkpoint.{name} is {getattr(self, name)}; it must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """Settings of evaluation; see evaluation/evaluate.py.

  Attributes:
    every_steps: evaluate the validation split during training every so many steps; 0 only at the end.
    max_bytes: of the evaluations every so many steps, score only the first so many bytes; 0 scores all. After the last
      step all are scored in any case: a shorter data.validation, or none and eval.py --max-bytes, shortens that.
    batch_size: windows scored at once; 0 takes what training takes at once, batch_size / accumulate.
    method: basic | sliding | strided | both (section 2.3.3 and Table 11); during training, too.
  """

  every_steps: int = 0
  max_bytes: int = 0
  batch_size: int = 0
  method: Method = "basic"

  def __post_init__(self):
    convert_fields(self)
    for name in ("every_steps", "max_bytes", "batch_size"):
      require(getattr(self, name) >= 0, f"eval.{name} is {getattr(self, name)}; it must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One run: the model, its data and how it is trained.

  Attributes:
    batch_size: windows per optimizer step, over all devices.
    accumulate: equal parts that a batch is worked through in, one after the other.
    num_steps: optimizer steps.
    seed: of the initial parameters, the order of the data and dropout.
    log_every: steps between progress lines.
    profile_steps: (first, last) step of a device trace; () traces nothing.
    sample_bytes: bytes generated at the end of training; 0 none.
    tracker: where numbers and pictures go beside the work directory: wandb | mlflow; empty for nowhere.
    tracker_project: the project, or experiment, that the run belongs to there.
  """

  model: ModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()
  batch_size: int
  accumulate: int = 1
  num_steps: int
  seed: int = 0
  log_every: int = 10
  profile_steps: tuple[int, ...] = ()
  sample_bytes: int = 0
  tracker: Literal["", "wandb", "mlflow"] = ""
  tracker_project: str = "megabyte_jax"

  def __post_init__(self):
    convert_fields(self)
    for name in ("batch_size", "accumulate", "num_steps", "log_every"):
      require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
    fewer = next(n for n in range(min(self.accumulate, self.batch_size), 0, -1) if self.batch_size % n == 0)
    require(
      fewer == self.accumulate,
      f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}; {fewer} would",
    )
    rates = self.optimizer.level_rates
    require(
      len(rates) in (0, len(self.model.levels)),
      f"optimizer.level_rates has {len(rates)} factors; the model has {len(self.model.levels)} levels",
    )
    require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be between 0 and {2**32 - 1}")
    require(self.sample_bytes >= 0, f"sample_bytes is {self.sample_bytes}; it must not be negative")
    require(
      not self.sample_bytes or self.data.form != "audio" or self.data.sample_rate > 0,
      "sample_bytes of audio needs data.sample_rate, such as 16000: the sampled recordings have no rate of their own",
    )
    require(
      not self.checkpoint.keep_best or bool(self.eval.every_steps and self.data.validation),
      "checkpoint.keep_best needs evaluations during training to choose from: set eval.every_steps and data.validation",
    )
    require(
      self.data.form != "subwords" or self.model.reads_tokens,
      "data.form=subwords is for models without patches, such as the Transformer with one level of patch_size 1: a "
      "patch is a fixed number of bytes",
    )
    require(
      self.data.form == "subwords" or self.model.vocab_size <= 256,
      f"model.vocab_size is {self.model.vocab_size}, but bytes have 256 values; set data.form=subwords, or fewer",
    )
    steps = self.profile_steps
    require(
      steps == () or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
      f"profile_steps is {steps}; give (first, last), counted from 1",
    )

  @property
  def windows_may_be_short(self) -> bool:
    """True if a window of training may end with its document, before the context does."""
    return self.data.windows_may_be_short or self.model.recurrent

  @property
  def bytes_per_step(self) -> int:
    """Bytes (or tokens) that a training step predicts."""
    return self.batch_size * self.model.predicted_bytes

  @property
  def scored_at_once(self) -> int:
    """Windows that an evaluation takes at once."""
    return self.eval.batch_size or self.batch_size // self.accumulate

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> Config:
    """Makes the typed form of a ConfigDict or a saved config; raises ConfigError naming the key at fault."""
    return dataclass_from_mapping(cls, values, "config")

  def to_dict(self) -> dict[str, Any]:
    """Returns plain dicts, lists and scalars, as saved beside a checkpoint (JSON)."""
    return mapping_from_dataclass(self)

  def to_config_dict(self) -> ml_collections.ConfigDict:
    """Returns a locked ConfigDict with every field, as `--config` files return it."""
    return ml_collections.ConfigDict(mapping_from_dataclass(self, leaf=ml_collections.ConfigDict)).lock()
