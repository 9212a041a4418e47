"""Builds the subword systems of Table 3, which the paper quotes from other work, as rows that can be run on PG-19.

Their papers leave much unsaid. What is taken here instead, beside the tokenizer (32,000 pieces of the training text;
Rae et al. used TFDS's SubwordTextEncoder):

  Transformer-XL, Compressive Transformer (Rae et al., 2019): 36 layers, 512 tokens of segment, memories as in Table 3,
    Adam to 3e-4 over 16,000 steps, a cosine to 1e-6 and clipping at 0.1 are published. Width, heads and the batch are
    not: they are those of Transformer-XL's enwik8 model (Dai et al., 2019), and 400 billion bytes in about the 500,000
    steps of the schedule.
  PerceiverAR (Hawthorne et al., 2022): 975 million parameters and a context of 2,048 are published, layers and latents
    are not: 17 layers of 2,048 have these parameters, and half of the context is latents.
  Block-Recurrent Transformer (Hutchins et al., 2022): 24 layers, of which 9 and 19 are recurrent, 1.3 billion
    parameters, segments of 4,096 in batches of 32 for 500,000 steps are published; Adafactor is replaced by AdamW.
  Transformer: not in the paper. 22 layers of 2,048, whose FLOPs per byte are those of the byte-level Transformer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megabyte_jax.config import (
  BlockRecurrentConfig,
  CompressiveTransformerConfig,
  Config,
  DataConfig,
  ModelConfig,
  TransformerXLConfig,
)
from megabyte_jax.paper import rows

PIECES = 32_000
BYTES_PER_TOKEN = 4.0  # an assumption, for FLOPs per byte and numbers of steps; runs print their own
TOKENS = round(rows.LONG_BYTES / BYTES_PER_TOKEN)

# Dai et al. (2019), of the larger enwik8 model.
_ENWIK8: dict[str, Any] = {"width": 1024, "num_heads": 8, "head_dim": 128, "ff_width": 3072}
_RAE: dict[str, Any] = {"num_layers": 36, "context": 512, "vocab_size": PIECES, **_ENWIK8, **rows.TRAINING}


def pg19() -> DataConfig:
  """Names PG-19 as subwords, whole books; `prepare tokenizer` makes data/pg19/tokenizer.model of its training split."""
  return dataclasses.replace(rows.text("pg19"), form="subwords", tokenizer="data/pg19/tokenizer.model")


def run(model: ModelConfig, *, batch_size: int, tokens: int = TOKENS) -> Config:
  """Builds a run that predicts so many tokens, with the optimizer of the paper's other rows."""
  return rows.run(model, pg19(), batch_size=batch_size, train_bytes=tokens)


def as_rae(config: Config) -> Config:
  """Returns the same run with the optimizer of Rae et al. (2019)."""
  optimizer = dataclasses.replace(
    config.optimizer,
    learning_rate=3e-4,
    schedule="cosine",
    warmup_steps=16_000,
    end_learning_rate=1e-6,
    clip_norm=0.1,
    weight_decay=0.0,
  )
  return dataclasses.replace(config, optimizer=optimizer)


def transformer() -> Config:
  """Builds the Transformer."""
  model = dataclasses.replace(rows.transformer((2048, 22), 2048), vocab_size=PIECES)
  return rows.with_method(run(model, batch_size=48), "sliding")


def perceiver_ar() -> Config:
  """Builds PerceiverAR."""
  return run(dataclasses.replace(rows.perceiver_ar((2048, 17), 2048, 1024), vocab_size=PIECES), batch_size=48)


def transformer_xl() -> Config:
  """Builds Transformer-XL."""
  return as_rae(run(TransformerXLConfig(memory_length=1024, **_RAE), batch_size=384))


def compressive_transformer() -> Config:
  """Builds the Compressive Transformer, with convolutions over 2 slots."""
  return as_rae(run(CompressiveTransformerConfig(memory_length=512, compressed_length=512, **_RAE), batch_size=384))


def block_recurrent() -> Config:
  """Builds the Block-Recurrent Transformer."""
  model = BlockRecurrentConfig(
    context=4096,
    vocab_size=PIECES,
    width=2048,
    num_layers=24,
    num_heads=16,
    recurrent_layers=(9, 19),
    **{**rows.TRAINING, "dropout": 0.05},
  )
  return run(model, batch_size=32, tokens=32 * 4096 * 500_000)
