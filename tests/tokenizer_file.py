"""A small tokenizer of the sample text, trained once for all tests of a process."""

import functools
import pathlib
import tempfile

from megabyte_jax.config import DataConfig
from megabyte_jax.data.subwords.training import train_tokenizer

PIECES = 300


@functools.cache
def tokenizer_file() -> str:
  path = pathlib.Path(tempfile.mkdtemp(prefix="tokenizer"), "small.model")
  train_tokenizer(["sample:text/train"], str(path), PIECES, DataConfig(), sample_bytes=100_000)
  return str(path)
