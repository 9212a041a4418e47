"""Compression comes back exactly, costs what the evaluation says, and refuses what does not belong together."""

import dataclasses
import itertools
import sys

import jax
import model_variants
import numpy as np
import pytest
from compressed_files import MEGABYTE, P, model_of, repacked, text_bytes
from flax import nnx

from megabyte_jax.config import DataConfig, PerceiverARConfig
from megabyte_jax.data.media.image_source import Images
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.generation import compression, entropy_coding
from megabyte_jax.models.build import abstract_model

PERCEIVER = PerceiverARConfig(context=20, latents=8, width=8, num_layers=1, num_heads=2)


def image_bytes():
  data = DataConfig(form="image", image_size=16)
  source = open_path("sample:images/validation", data)
  assert isinstance(source, Images)
  return source.read(0, 0, 768).tobytes()


def random_bytes():
  return np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()


@pytest.mark.parametrize("kind", [text_bytes, image_bytes, random_bytes])
@pytest.mark.parametrize("length", [0, 1, P - 1, P, P + 1, 24, 25, 200])
@pytest.mark.usefixtures("always_coded")
def test_what_is_compressed_comes_back(model, kind, length):
  text = kind()[:length]
  assert len(text) == length
  pieces = []
  packed = compression.compress(model, text, batch=3, on_bytes=pieces.append)
  assert sum(pieces) == length
  assert compression.decompress(model, packed, on_bytes=pieces.append) == text
  assert sum(pieces) == 2 * length
  assert len(packed) - len(compression.read(packed)[1]) < 470


@pytest.mark.usefixtures("always_coded")
def test_perceiver_ar_too():
  model, text = model_of(PERCEIVER), text_bytes()[:70]
  assert compression.decompress(model, compression.compress(model, text)) == text


@pytest.mark.usefixtures("always_coded")
def test_bfloat16_too():
  model, text = model_of(dataclasses.replace(MEGABYTE, compute_dtype="bfloat16")), text_bytes()[:60]
  packed = compression.compress(model, text, batch=2)
  assert compression.read(packed)[0].coding.dtype == "bfloat16"
  assert compression.decompress(model, packed) == text


@pytest.mark.usefixtures("always_coded")
def test_improbable_bytes_come_back():
  """A model that is very sure, and wrong."""
  sure = jax.tree.map(lambda a: 40 * a, model_variants.draw_parameters(MEGABYTE))
  model = nnx.merge(abstract_model(MEGABYTE)[0], sure)
  text = random_bytes()[:48]
  assert compression.decompress(model, compression.compress(model, text)) == text


@pytest.mark.usefixtures("always_coded")
def test_more_windows_side_by_side_cost_nothing(model):
  sizes = [
    len(compression.read(compression.compress(model, text_bytes()[:400], batch=n, adapt=False))[1]) for n in (1, 5)
  ]
  assert abs(sizes[0] - sizes[1]) <= 4  # bytes: one code word


def test_what_the_model_makes_no_smaller_is_stored(model):
  text = np.random.default_rng(0).bytes(200)
  packed = compression.compress(model, text)
  header, code = compression.read(packed)
  assert header.coding is None and code == text and len(packed) <= len(text) + 128
  assert compression.stored_bytes(packed, MEGABYTE) == len(text)
  assert compression.decompress(None, packed) == text


def test_blocks_are_stored_one_by_one(model, monkeypatch):
  """Some are coded, some stored: here the second."""
  text, paying = text_bytes()[:200], itertools.cycle([True, False, True])
  monkeypatch.setattr(entropy_coding, "_BLOCK", 50)
  monkeypatch.setattr(entropy_coding, "pays", lambda coded, stored: next(paying))
  code = entropy_coding.encode(model, np.frombuffer(text, np.uint8), 1)
  parts = entropy_coding.split(code, len(text), MEGABYTE, 1)
  assert [(part.start, part.stop, part.words is None) for part in parts] == [
    (0, 72, False),
    (72, 144, True),
    (144, 200, False),
  ]
  assert parts[1].stored == text[72:144]
  done = []
  assert entropy_coding.decode(model, code, len(text), 1, done.append).tobytes() == text
  assert sum(done) == len(text)


@pytest.mark.usefixtures("always_coded")
def test_other_models_and_circumstances_are_named(model, monkeypatch):
  text = text_bytes()[:30]
  packed = compression.compress(model, text, step=7)
  assert compression.decompress(model, repacked(packed)) == text
  at = r"with the model [0-9a-f]{16} \(here .*\) of step 7 of its run; give the --workdir and --step with which"
  with pytest.raises(ConfigError, match=at):
    compression.decompress(model_of(MEGABYTE, seed=1), packed)
  with pytest.raises(ConfigError, match="with the model"):
    compression.decompress(model_of(dataclasses.replace(MEGABYTE, activation="gelu")), packed)
  here = compression._circumstances(model)
  for key, value, said in (
    ("xla_flags", "--xla_a --xla_b", r"with XLA_FLAGS --xla_a --xla_b \(here .*\); set XLA_FLAGS to the same"),
    ("dtype", "bfloat16", r"in bfloat16 \(here float32\); use a machine of that kind"),
    ("device", "TPU v5", r"on the device TPU v5 \(here .*\); use a machine of that kind"),
    ("cores", 9999, rf"on 9999 CPU cores \(here {here['cores']}\); use a machine with as many"),
    ("jax", "0.1", r"with jax 0.1 \(here .*\); install that version"),
    ("host", "0a1b", r"with NumPy's instruction set 0a1b \(here .*\); use a machine of that kind"),
    ("constriction", "9", r"with constriction 9 \(here .*\); install that version"),
  ):
    with pytest.raises(ConfigError, match=f"it was compressed {said}$"):
      compression.decompress(model, repacked(packed, **{key: value}))
  monkeypatch.setattr(compression, "_circumstances", lambda _: here | {"cores": 4})
  with pytest.raises(
    ConfigError, match=r"on 2 CPU cores \(here 4\), with jax 9 .*; begin the .* `taskset -c 0-1` .*, in"
  ):
    compression.decompress(model, repacked(packed, cores=2, jax="9"))
  with pytest.raises(ConfigError, match=r"it was compressed on the device H200 \(here [^,]*\); use a machine"):
    compression.decompress(model, repacked(packed, cores=0, device="H200"))
  with pytest.raises(DataError, match="another version"):
    compression.decompress(model, repacked(packed, format=compression.FORMAT + 1))


@pytest.mark.usefixtures("always_coded")
def test_other_probabilities_are_found_out(model, monkeypatch):
  """Where the header fits and the arithmetic does not."""
  packed = compression.compress(model, text_bytes()[:200], batch=3)
  monkeypatch.setattr(compression, "fingerprint", lambda _: compression.read(packed)[0].coding.model)
  with pytest.raises(DataError, match="probabilities"):
    compression.decompress(model_of(MEGABYTE, seed=1), packed)


def test_bytes_that_the_model_does_not_know_are_refused():
  with pytest.raises(ConfigError, match="knows only bytes below 100"):
    compression.compress(model_of(dataclasses.replace(MEGABYTE, vocab_size=100)), b"\x64")


def test_a_model_that_has_gone_to_nothing_is_refused():
  broken = jax.tree.map(lambda a: a * np.nan, model_variants.draw_parameters(MEGABYTE))
  with pytest.raises(FloatingPointError, match="not finite"):
    compression.compress(nnx.merge(abstract_model(MEGABYTE)[0], broken), b"abc")


def test_without_the_coder_the_package_to_install_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "constriction", None)
  with pytest.raises(ConfigError, match="pip install constriction"):
    entropy_coding.constriction()


def test_a_prompt_is_read_by_the_same_program_in_every_process(monkeypatch):
  """Without timing on a GPU, as each step."""
  options = []
  monkeypatch.setattr(entropy_coding, "platform", lambda: "gpu")
  monkeypatch.setattr(entropy_coding.jax, "jit", lambda f, compiler_options, **_: options.append(compiler_options) or f)
  for jitted in (entropy_coding._state_after, entropy_coding._step):
    jitted.__wrapped__()
  assert options == [{"xla_gpu_autotune_level": 0}] * 2
