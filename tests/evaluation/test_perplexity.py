"""Word-level perplexity against the paper's own conversion."""

import math

import numpy as np
import pytest

from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation import perplexity
from megabyte_jax.evaluation.perplexity import PG19, count_words, word_perplexity


def nats_of(bits_per_byte, num_bytes):
  return bits_per_byte * num_bytes * math.log(2)


def bits_per_byte_of(perplexity, words, num_bytes):
  return math.log2(perplexity) * words / num_bytes


def test_table_11_becomes_table_3():
  """0.8751 bits per byte (sliding and strided) is the 36.4 of Table 3."""
  size = PG19["test"]
  assert (size.bytes, size.words) == (41_289_101, 6_966_499)
  assert word_perplexity(nats_of(0.8751, size.bytes), size.words) == pytest.approx(36.4, abs=0.05)
  assert bits_per_byte_of(36.4, size.words, size.bytes) == pytest.approx(0.8751, abs=5e-4)


def test_other_rows_of_table_3():
  size = PG19["test"]
  assert bits_per_byte_of(69.4, size.words, size.bytes) == pytest.approx(1.0321, abs=5e-4)
  assert bits_per_byte_of(88.8, size.words, size.bytes) == pytest.approx(1.0921, abs=5e-4)


@pytest.mark.parametrize("chunk", [1, 3, 2**24])
def test_words_are_counted_as_split_does(monkeypatch, chunk):
  monkeypatch.setattr(perplexity, "_CHUNK", chunk)
  for text in (b"", b" ", b"one", b" one\r\n two\t\x0bthree\x0c", "so, caf\u00e9 au lait\n".encode()):
    assert count_words(text) == len(text.split())
    assert count_words(np.frombuffer(text, np.uint8)) == len(text.split())


def test_beyond_all_floats_it_is_infinite():
  assert word_perplexity(1e5, 1) == float("inf")


@pytest.mark.parametrize("words", ["²", "0", "-1", "9" * 5000, "many"])
def test_what_is_no_number_of_words(words, tmp_path):
  (tmp_path / "text").write_bytes(b"a b")
  with pytest.raises(ConfigError, match="is neither a number nor count"):
    perplexity.number_of_words(words, "", open_path(str(tmp_path / "text"), DataConfig()))


def test_no_words_is_an_error():
  with pytest.raises(ConfigError, match="number of words"):
    word_perplexity(1.0, 0)
