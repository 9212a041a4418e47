"""Trains a tokenizer on texts: byte-pair merges by SentencePiece, without normalisation and with byte pieces."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterator

import numpy as np

from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.sources import Joined, Source
from megabyte_jax.data.subwords.segments import LONGEST, runs, segments
from megabyte_jax.data.subwords.tokenizer import Tokenizer, sentencepiece
from megabyte_jax.errors import DataError, require
from megabyte_jax.files.atomic_file import replacing

FEWEST, MOST = 300, 1 << 20  # pieces: 256 bytes, the unknown piece, and some characters
_BLOCK = 1 << 20
_COVERAGE = 0.98, 0.9995  # of the text, by characters that get pieces (the others become bytes): the least and most
_SKIPPED = "\u2585\0"  # SentencePiece leaves out texts that hold its sign of the unknown, or NUL


def train_tokenizer(
  sources: list[str], path: str, pieces: int, data: DataConfig, sample_bytes: int = 10**8
) -> Tokenizer:
  """Trains a tokenizer and writes it to a file, which appears whole or not at all.

  Args:
    sources: names of texts, see open_data.py.
    path: of the new model.
    pieces: how many, those of single bytes included.
    data: how sources are opened (skip_bad, raw, ...).
    sample_bytes: how much text is looked at, in evenly spaced blocks of 1 MiB; less where there is less.

  Raises:
    ConfigError: a number makes no sense.
    DataError: a source cannot be read, sentencepiece is missing, or the text is too small for so many pieces.
  """
  require(FEWEST <= pieces <= MOST, f"--pieces is {pieces}; it must be between {FEWEST} and {MOST:,}")
  require(sample_bytes >= 1, f"--sample-bytes is {sample_bytes}; it must be at least 1")
  trainer = sentencepiece().SentencePieceTrainer
  opened = [open_path(source, data) for source in sources]
  text = opened[0] if len(opened) == 1 else Joined(opened)
  characters = collections.Counter[str]()
  for segment in _sentences(text, sample_bytes):
    characters.update(segment)
  if not characters:
    raise DataError(f"{sources[0]} holds no text in UTF-8 to train a tokenizer on")
  most_common = characters.most_common((pieces - 257) // 2)  # the other half is for pieces of several characters
  share = sum(count for _, count in most_common) / characters.total()
  made = io.BytesIO()
  try:
    trainer.train(
      sentence_iterator=_sentences(text, sample_bytes),
      model_writer=made,
      model_type="bpe",
      vocab_size=pieces,
      byte_fallback=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      character_coverage=min(max(_COVERAGE[0], share), _COVERAGE[1]),
      max_sentence_length=4 * LONGEST,
      bos_id=-1,
      eos_id=-1,
      pad_id=-1,
      minloglevel=2,
    )
  except RuntimeError as error:
    said = " ".join(str(error).split())[-200:]
    message = f"no tokenizer of {pieces:,} pieces can be made of this text; take other --pieces, or more text ({said})"
    raise DataError(message) from error
  tokenizer = Tokenizer(made.getvalue(), path)
  with replacing(path) as temporary:
    temporary.write_bytes(made.getvalue())
  return tokenizer


def _sentences(source: Source, sample_bytes: int) -> Iterator[str]:
  """Yields the texts that the trainer looks at, from evenly spaced blocks of all documents joined."""
  ends = np.cumsum(source.lengths)
  total = int(ends[-1])
  count = max(1, min(sample_bytes, total) // _BLOCK)
  for number in range(count):
    start = number * total // count
    stop = (number + 1) * total // count if sample_bytes >= total else start + min(_BLOCK, sample_bytes)
    document = int(ends.searchsorted(start, side="right"))
    while start < stop:
      first = int(ends[document - 1]) if document else 0
      last = min(stop, int(ends[document]))
      for segment in segments([source.read(document, start - first, last - first).tobytes()]):
        for text, known in runs(segment):
          if known and not any(sign in text for sign in _SKIPPED):
            yield text
      start, document = last, document + 1
