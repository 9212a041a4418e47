"""A small tokenizer of the sample text, trained once for all tests of a process."""

import atexit
import functools
import pathlib
import shutil
import tempfile

from megabyte_jax.config import DataConfig
from megabyte_jax.data.subwords.training import train_tokenizer

PIECES = 300


@functools.cache
def tokenizer_file() -> str:
  folder = tempfile.mkdtemp(prefix="tokenizer")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  path = pathlib.Path(folder, "small.model")
  train_tokenizer(["sample:text/train"], str(path), PIECES, DataConfig(), sample_bytes=100_000)
  return str(path)
