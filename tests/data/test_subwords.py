"""Subwords: any bytes become pieces and come back, tokens are made once and read at any place."""

import io
import itertools
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_file import PIECES, tokenizer_file

from megabyte_jax.commands import prepare
from megabyte_jax.config import Config, DataConfig, Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import open_path, open_source
from megabyte_jax.data.sources import Mixture
from megabyte_jax.data.subwords import source as subwords
from megabyte_jax.data.subwords.segments import LONGEST, segments
from megabyte_jax.data.subwords.tokenizer import Tokenizer, load_tokenizer
from megabyte_jax.errors import ConfigError, DataError

LEVEL = Level(patch_size=1, width=8, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer(tokenizer_file())


def data_config(folder, **settings):
  return DataConfig(form="subwords", tokenizer=tokenizer_file(), cache_dir=str(folder / "cache"), **settings)


awkward = st.text(st.sampled_from("\u2581\u2585 \n\r\0\ta<é字\u0301\ufeff\x7f"), max_size=40).map(str.encode)
letters = st.sampled_from([b"word ", b"x", "é".encode(), b"\n", b" "])
repeated = st.tuples(letters, st.integers(0, LONGEST + 50)).map(lambda pair: pair[0] * pair[1])
anything = st.lists(
  st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode), awkward, repeated),
  max_size=4,
).map(b"".join)


@settings(max_examples=60, deadline=None)
@given(anything, st.lists(st.integers(1, 6000), max_size=5))
def test_any_bytes_come_back_however_they_are_cut(text, cuts):
  tokenizer = load_tokenizer(tokenizer_file())
  tokens = tokenizer.encode(text)
  assert tokenizer.decode(tokens) == text
  assert tokenizer.lengths[tokens].sum() == len(text)
  assert all(len(segment) <= LONGEST for segment in segments([text]))
  places = [0, *np.clip(np.cumsum(cuts), 0, len(text)).tolist(), len(text)]
  parts = [text[a:b] for a, b in itertools.pairwise(places)]
  np.testing.assert_array_equal(np.concatenate([*tokenizer.encode_blocks(parts), tokens[:0]]), tokens)


def test_texts_that_are_skipped_are_named(tmp_path):
  for name, text in {"a.txt": b"the sea", "b.txt": b""}.items():
    (tmp_path / name).write_bytes(text)
  source = open_path(f"{tmp_path}/*.txt", data_config(tmp_path, skip_bad=True))
  assert (source.skipped, source.skipped_names) == (1, ["b.txt"])


def test_pieces_are_more_than_bytes(tokenizer):
  text = b"the whale and the ship of the sea"
  assert tokenizer.size == PIECES and len(tokenizer.encode(text)) < len(text)
  assert b" the" in tokenizer.pieces and b"\n" in tokenizer.pieces
  assert tokenizer.dtype == np.uint16


def test_tokens_are_made_once_and_read_at_any_place(tmp_path, tokenizer, monkeypatch):
  texts = {"a.txt": b"Call me Ishmael.\n" * 300, "b.txt": bytes(range(256)), "c.txt": "é\u2581\n".encode() * 5}
  (tmp_path / "texts").mkdir()
  for name, text in texts.items():
    (tmp_path / "texts" / name).write_bytes(text)
  data, spec = data_config(tmp_path), str(tmp_path / "texts")
  source = open_path(spec, data)
  assert isinstance(source, subwords.Subwords) and list(source.names) == list(texts)
  for i, text in enumerate(texts.values()):
    tokens = tokenizer.encode(text)
    assert source.lengths[i] == len(tokens)
    np.testing.assert_array_equal(source.read(i, 3, len(tokens) - 1), tokens[3:-1])
  assert subwords.text_of(source).lengths.tolist() == [len(text) for text in texts.values()]

  with monkeypatch.context() as patched:  # from the cache, also by another process
    patched.setattr(Tokenizer, "encode_blocks", None)
    again = open_path(spec, data)
  assert again.fingerprint == source.fingerprint
  np.testing.assert_array_equal(again.read(1, 0, 5), source.read(1, 0, 5))

  os.utime(tmp_path / "texts" / "a.txt", (1, 1))  # changed, perhaps where no fingerprint looks
  with monkeypatch.context() as patched, pytest.raises(TypeError):
    patched.setattr(Tokenizer, "encode_blocks", None)
    open_path(spec, data)

  open_path(spec, data)
  [kept] = [name for name in os.listdir(tmp_path / "cache" / "tokens") if "." not in name]
  (tmp_path / "cache" / "tokens" / kept).write_bytes(b"")  # cut short: made again
  assert open_path(spec, data).read(0, 0, 9).tolist() == open_path(spec, data).read(0, 0, 9).tolist()


def test_tokens_of_a_text_as_it_was_before_are_removed(tmp_path):
  data, cached = data_config(tmp_path), tmp_path / "cache" / "tokens"
  odd = os.fsdecode(b"\xe9.txt")  # which is not UTF-8
  for name in ("a.txt", odd):
    (tmp_path / name).write_bytes(b"Call me Ishmael.\n" * 30)
  both = f"{tmp_path}/a.txt,{tmp_path}/{odd}"
  first = open_path(both, data)
  count = len(list(cached.iterdir()))
  for second in range(3):
    os.utime(tmp_path / "a.txt", (second, second))
    open_path(both, data)
  (tmp_path / "a.txt").write_bytes(b"It is not down on any map.\n")
  changed = open_path(both, data)
  assert len(list(cached.iterdir())) == count == 6  # tokens, where they end, a lock: of each text
  assert changed.lengths[0] < first.lengths[0]
  assert changed.read(1, 0, 5).tolist() == first.read(1, 0, 5).tolist()  # of the other text, which is still there


def test_batches_and_mixtures_hold_tokens(tmp_path, tokenizer):
  for name in "ab":
    (tmp_path / name).write_bytes(f"Chapter {name}. ".encode() * 200)
  spec = f"{tmp_path / 'a'},{tmp_path / 'b'}"
  joined = open_source(data_config(tmp_path, train=spec), "train")
  mixture = open_source(data_config(tmp_path, train=spec, train_weights=(1.0, 3.0)), "train")
  assert isinstance(mixture, Mixture)
  for source in (joined, mixture):
    assert subwords.token_lengths(source) is tokenizer.lengths
    assert subwords.text_of(source).lengths.tolist() == [2200, 2200]
    _, batch = next(batches(source, batch_size=2, context=16, seed=0, vocab_size=PIECES, num_threads=0))
    assert batch.x_BT.dtype == np.uint16
    assert b"Chapter" in tokenizer.decode(batch.x_BT[0])


@pytest.mark.parametrize("max_bytes", [1, 500, 1000, 1001, 1499, 99999, 0])
def test_tokens_within_the_first_bytes(tmp_path, tokenizer, max_bytes):
  texts = [b"the sea, " * 100 + b"x" * 100, b"a whale. " * 60]
  for i, text in enumerate(texts):
    (tmp_path / f"{i}.txt").write_bytes(text)
  source = open_path(str(tmp_path / "*.txt"), data_config(tmp_path))
  left = max_bytes or sum(map(len, texts))
  for text, count in zip(texts, subwords.tokens_within(source, max_bytes), strict=True):
    tokens = tokenizer.encode(text)
    starts = np.cumsum(tokenizer.lengths[tokens]) - tokenizer.lengths[tokens]
    assert count == np.count_nonzero(starts < left)  # the last one may reach beyond
    left = max(0, left - len(text))


def test_prepare_tokenizer_prints_the_checksum(tmp_path, monkeypatch, capsys):
  out = tmp_path / "made.model"
  arguments = ["sample:text/train", "sample:text/validation", out, f"--pieces={PIECES}", "--sample-bytes=60000"]
  monkeypatch.setattr(sys, "argv", ["prepare", "tokenizer", *map(str, arguments)])
  prepare.main()
  made = load_tokenizer(str(out))
  assert made.sha256 in capsys.readouterr().out
  assert made.decode(made.encode(b"a\xffb")) == b"a\xffb"


def test_a_tokenizer_without_a_name_overwrites_no_text(tmp_path):
  for name in ("a.txt", "b.txt"):
    (tmp_path / name).write_text("a text")
  with pytest.raises(ConfigError, match=r"OUT=.*b\.txt exists; name another file, or give --force"):
    prepare.main(["tokenizer", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
  assert (tmp_path / "b.txt").read_text() == "a text"


def sentencepiece_model(**options):
  import sentencepiece  # noqa: PLC0415

  made = io.BytesIO()
  text = iter(["some words of a text", "and some more words"] * 50)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=text, model_writer=made, model_type="bpe", minloglevel=2, **options
  )
  return made.getvalue()


@pytest.mark.parametrize(
  ("file", "error", "message"),
  [
    (lambda: b"no model", DataError, "T is not a SentencePiece model; make one with"),
    (lambda: sentencepiece_model(vocab_size=40), ConfigError, "T lacks pieces for single bytes"),
    (lambda: sentencepiece_model(vocab_size=300, byte_fallback=True), ConfigError, "T changes texts, such as"),
  ],
)
def test_tokenizers_that_lose_something_are_refused(file, error, message):
  with pytest.raises(error, match=message):
    Tokenizer(file(), "T")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
  (tmp_path / "other.model").write_bytes(b"another file than the one in memory")
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(DataError, match=r'not installed: pip install -e "\.\[subwords\]"'):
    load_tokenizer(str(tmp_path / "other.model"))


def test_another_tokenizer_is_refused():
  with pytest.raises(ConfigError, match="has changed: its SHA-256 sum is"):
    load_tokenizer(tokenizer_file(), "0" * 64)


def test_too_few_pieces_for_the_characters(tmp_path):
  (tmp_path / "t.txt").write_text("".join(chr(0x4E00 + i) for i in range(3000)) * 3)
  arguments = ["tokenizer", str(tmp_path / "t.txt"), str(tmp_path / "t.model"), f"--pieces={PIECES}"]
  with pytest.raises(DataError, match="no tokenizer of 300 pieces can be made of this text"):
    prepare.main(arguments)
  assert not (tmp_path / "t.model").exists()


def test_configs_of_subwords(tmp_path):
  data = data_config(tmp_path)

  def run(model, data):
    return Config(model=model, data=data, batch_size=1, num_steps=1)

  transformer = MegabyteConfig(context=8, levels=(LEVEL,), vocab_size=32_000)
  run(transformer, data)
  run(PerceiverARConfig(context=8, latents=4, width=8, num_layers=1, num_heads=2, vocab_size=32_000), data)
  with pytest.raises(ConfigError, match=r"bytes have 256 values; set data.form=subwords"):
    run(transformer, DataConfig())
  patches = (Level(patch_size=4, width=16, num_layers=1, num_heads=2), LEVEL)
  with pytest.raises(ConfigError, match="a patch is a fixed number of bytes"):
    run(MegabyteConfig(context=8, levels=patches), data)
  with pytest.raises(ConfigError, match=r"patches are of bytes, and bytes have 1 to 256 values"):
    MegabyteConfig(context=8, levels=patches, vocab_size=300)
  with pytest.raises(ConfigError, match=r"needs data.tokenizer"):
    DataConfig(form="subwords")
  with pytest.raises(ConfigError, match=r"but data.form is bytes"):
    DataConfig(tokenizer="t.model")
  with pytest.raises(ConfigError, match=r"has 300 pieces, .* set --config\.model\.vocab_size=300"):
    subwords.check_vocabulary(open_path("sample:text/validation", data), 256)
  with pytest.raises(SystemExit):  # texts are packed as bytes
    prepare.main(["pack", "sample:text/train", str(tmp_path / "packed"), "--form=subwords"])
