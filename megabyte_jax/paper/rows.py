"""Builds the rows of configs/paper/ from the paper's settings (Tables 14 and 15).

Where the paper is silent, docs/design.md states the choice made here and its reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from megabyte_jax.config import (
  Config,
  DataConfig,
  EvalConfig,
  Level,
  MegabyteConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  PerceiverARConfig,
)
from megabyte_jax.config.parsing import require_known
from megabyte_jax.config.run import Method, Scan
from megabyte_jax.errors import require
from megabyte_jax.models import flops

Shape = tuple[int, int]  # (width, layers) as Table 15 writes it; for a global model the width of a whole patch

BYTES = 80_000_000_000  # trained on in the controlled comparisons (section 5)
LONG_BYTES = 400_000_000_000  # Tables 3, 11 and 17
IMAGENET64_BYTES = 1_400_000_000_000  # Table 4

TRAINING: dict[str, Any] = {"dropout": 0.1, "remat": "full"}


def level(patch_size: int, shape: Shape, **options: Any) -> Level:
  """Builds a level of one of the standard widths (Table 14).

  A width that the patch size does not divide is rounded up to the next multiple of the patch size and 8
  (2048 -> 2064 and 2560 -> 2568 for P = 12, 4096 -> 4128 for P = 48). Heads keep their standard width.
  """
  width, num_layers = shape
  heads = flops.STANDARD_SIZES[width].heads
  unit = math.lcm(patch_size, 8)
  rounded = -(-width // unit) * unit
  return Level(
    patch_size=patch_size,
    width=rounded,
    num_layers=num_layers,
    num_heads=heads,
    head_dim=width // heads if rounded != width else 0,
    **options,
  )


def megabyte(
  global_shape: Shape | None,
  local_shape: Shape | None,
  *,
  patch_size: int,
  context: int,
  cross_patch: bool = True,
  conv: bool = False,
) -> MegabyteConfig:
  """Builds MEGABYTE or one of its ablations: a shape of None leaves that model out.

  Cross-patch attention covers the whole previous patch (r = P), with rotary positions in the local model.
  """
  levels = []
  if global_shape:
    levels.append(level(patch_size, global_shape, conv_filters=(3, 5, 7) if conv else ()))
  if local_shape:
    levels.append(level(1, local_shape, rotary=cross_patch, cross_patch=patch_size if cross_patch else 0))
  span = 0 if global_shape else patch_size
  return MegabyteConfig(context=context, levels=tuple(levels), span=span, **TRAINING)


def transformer(shape: Shape, context: int, window: int = 0) -> MegabyteConfig:
  """Builds the byte-level Transformer; each layer attends to the last `window` bytes, to the whole context if 0."""
  return MegabyteConfig(context=context, levels=(level(1, shape, attention_window=window),), **TRAINING)


def perceiver_ar(shape: Shape, context: int, latents: int) -> PerceiverARConfig:
  """Builds PerceiverAR; its cross-attention layer is not counted among the layers in `shape`."""
  width, num_layers = shape
  return PerceiverARConfig(
    context=context,
    latents=latents,
    width=width,
    num_layers=num_layers,
    num_heads=flops.STANDARD_SIZES[width].heads,
    **TRAINING,
  )


def run(
  model: ModelConfig,
  data: DataConfig,
  *,
  batch_size: int,
  learning_rate: float = 2e-4,
  train_bytes: int = BYTES,
  method: Method = "basic",
) -> Config:
  """Builds a whole run: the optimizer of appendix A.1, and the steps that predict `train_bytes` bytes."""
  num_steps = round(train_bytes / (batch_size * model.predicted_bytes))
  return Config(
    model=model,
    data=data,
    optimizer=OptimizerConfig(learning_rate=learning_rate),
    mesh=MeshConfig(data=1, fsdp=-1),  # the paper shards parameters and optimizer state over all devices (section 4.2)
    eval=EvalConfig(every_steps=max(1, num_steps // 40), max_bytes=2**24, method=method),
    batch_size=batch_size,
    num_steps=num_steps,
  )


def with_method(config: Config, method: Method) -> Config:
  """Returns the same run with another evaluation method (Table 11)."""
  return dataclasses.replace(config, eval=dataclasses.replace(config.eval, method=method))


def select(rows: Mapping[str, Config], name: str) -> ml_collections.ConfigDict:
  """Returns the row called `name` as a config file returns it.

  Raises:
    ConfigError: no row has that name; the message lists the names.
  """
  require(name != "", f"this file holds several rows; write --config=FILE.py:NAME with one of {', '.join(rows)}")
  require_known(f"row {name!r} in this file", name, rows)
  return rows[name].to_config_dict()


def text(name: str) -> DataConfig:
  """Names a folder of your own, data/NAME/{train,validation,test}, with one file per document.

  PG-19 is public (https://github.com/google-deepmind/pg19); Stories, Books, arXiv and Code never were or no longer are.
  Windows of books stay inside their book; shorter documents are packed end to end.
  """
  return DataConfig(
    train=f"data/{name}/train",
    validation=f"data/{name}/validation",
    test=f"data/{name}/test",
    documents="whole" if name in ("pg19", "books") else "packed",
  )


def image64() -> DataConfig:
  """Names downsampled ImageNet, 64 x 64 pixels."""
  name = "tfds:downsampled_imagenet/64x64"
  return DataConfig(
    train=f"{name}:train",
    validation=f"{name}:validation",
    form="image",
    image_size=64,
    scan_patch=12,
    documents="whole",
  )


def imagenet(size: int, scan_patch: int = 192, scan: Scan = "patch") -> DataConfig:
  """Names ImageNet (ILSVRC 2012), scaled and cropped to size x size; its archives must be downloaded by hand."""
  return DataConfig(
    train="tfds:imagenet2012:train",
    validation="tfds:imagenet2012:validation",
    form="image",
    image_size=size,
    convert_images=True,  # some of them are grey or CMYK
    scan=scan,
    scan_patch=scan_patch,
    documents="whole",
  )


def audio() -> DataConfig:
  """Names 16 kHz, 16-bit speech of your own in data/audio/{train,validation,test}; the paper's 2 TB are unpublished."""
  return DataConfig(
    train="data/audio/train",
    validation="data/audio/validation",
    test="data/audio/test",
    form="audio",
    sample_rate=16_000,
  )


# The base rows of Table 15, by the data they belong to; several tables share them.


def text_transformer(data: str, context: int = 1024, train_bytes: int = BYTES) -> Config:
  """Builds the Transformer for text, 320M parameters."""
  return run(transformer((1024, 22), context), text(data), batch_size=72, train_bytes=train_bytes)


def text_windowed_transformer(data: str) -> Config:
  """Builds a row that is not in the paper: text, attention windows of 1,024 in a context of 8,192; 7% more FLOPs."""
  return run(transformer((1024, 22), 8192, 1024), text(data), batch_size=9)


def text_perceiver_ar(data: str, train_bytes: int = BYTES) -> Config:
  """Builds PerceiverAR for text, 248M, trained on random spans of each text (section 4.1), short ones too."""
  spans = dataclasses.replace(text(data), documents="whole")
  return run(perceiver_ar((1024, 17), 8192, 1024), spans, batch_size=72, train_bytes=train_bytes)


def text_megabyte(
  data: str,
  global_shape: Shape = (2048, 14),
  local_shape: Shape = (1024, 18),
  *,
  context: int = 8192,
  train_bytes: int = BYTES,
  method: Method = "basic",
  **model: Any,
) -> Config:
  """Builds MEGABYTE for text, 758M + 262M by default; a longer context keeps the bytes of a batch."""
  return run(
    megabyte(global_shape, local_shape, patch_size=8, context=context, **model),
    text(data),
    batch_size=48 * 8192 // context,
    train_bytes=train_bytes,
    method=method,
  )


def image256_megabyte(
  global_shape: Shape | None = (768, 12),
  local_shape: Shape | None = (768, 12),
  *,
  patch_size: int = 192,
  scan: Scan = "patch",
  **model: Any,
) -> Config:
  """Builds MEGABYTE for Image256, 125M + 125M by default."""
  return run(
    megabyte(global_shape, local_shape, patch_size=patch_size, context=196_608, **model),
    imagenet(256, patch_size, scan),
    batch_size=16,
  )


def image256_perceiver_ar(scan: Scan = "patch") -> Config:
  """Builds PerceiverAR for Image256, 62M parameters."""
  return run(perceiver_ar((768, 6), 8192, 768), imagenet(256, scan=scan), batch_size=256)


def audio_megabyte(
  global_shape: Shape | None = (1024, 24), local_shape: Shape | None = (768, 12), **model: Any
) -> Config:
  """Builds MEGABYTE for audio, 350M + 125M by default."""
  return run(megabyte(global_shape, local_shape, patch_size=32, context=524_288, **model), audio(), batch_size=32)
