"""Compression comes back exactly, costs what the evaluation says, and refuses what does not belong together."""

import dataclasses
import itertools
import json
import math
import pathlib
import sys

import jax
import model_variants
import numpy as np
import pytest
import tiny_config
from flax import nnx
from run_commands import evaluate_command, finish, start, write_data

import train
from megabyte_jax.checkpoints import trained_model
from megabyte_jax.commands import compress
from megabyte_jax.config import Config, DataConfig, EvalConfig, Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.data.media.image_source import Images
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_path
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.generation import compression, entropy_coding
from megabyte_jax.models.build import abstract_model

P = 4
MEGABYTE = MegabyteConfig(
  context=24,
  levels=(
    Level(patch_size=P, width=16, num_layers=1, num_heads=2, conv_filters=(3,)),
    Level(patch_size=1, width=8, num_layers=1, num_heads=2, rotary=True, cross_patch=4),
  ),
)
PERCEIVER = PerceiverARConfig(context=20, latents=8, width=8, num_layers=1, num_heads=2)


def model_of(config, seed=0):
  return nnx.merge(abstract_model(config)[0], model_variants.draw_parameters(config, seed))


@pytest.fixture(scope="module")
def model():
  return model_of(MEGABYTE)


@pytest.fixture
def always_coded(monkeypatch):
  """The models of these tests know nothing, and would have all stored."""
  monkeypatch.setattr(entropy_coding, "pays", lambda coded, stored: True)


def text_bytes():
  return pathlib.Path(SAMPLE_FOLDER, "text", "train", "moby_dick.txt").read_bytes()[40_000:]


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
  assert len(packed) - len(compression.read(packed)[1]) < 450


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


@pytest.mark.usefixtures("always_coded")
def test_an_altered_or_short_file_is_refused(model):
  packed = compression.compress(model, text_bytes()[:30])
  for place in range(len(packed)):
    altered = bytearray(packed)
    altered[place] ^= 1
    with pytest.raises(DataError, match="altered" if place >= 8 else "no file that megabyte_jax"):
      compression.read(bytes(altered))
  for length in range(len(packed)):
    with pytest.raises(DataError, match=r"altered|no file that megabyte_jax"):
      compression.read(packed[:length])
  with pytest.raises(DataError, match="altered"):
    compression.read(packed + b"\0")


def with_header(packed, header, code=None):
  """The file with these bytes as its header, perhaps another code, and right checksums."""
  start = len(compression._MAGIC) + 4
  end = start + int.from_bytes(packed[start - 4 : start], "little")
  code = packed[end : -compression._DIGEST] if code is None else code
  body = packed[: start - 4] + len(header).to_bytes(4, "little") + header + code
  return body + compression._digest(body)


def header_of(packed):
  start = len(compression._MAGIC) + 4
  return packed[start : start + int.from_bytes(packed[start - 4 : start], "little")]


def repacked(packed, **changes):
  """The file with other fields in its header, those of `coding` too, and right checksums; None leaves one out."""
  fields = json.loads(header_of(packed))
  for name, value in changes.items():
    group = fields["coding"] if name in fields["coding"] else fields
    group[name] = value
    if value is None:
      del group[name]
  return with_header(packed, json.dumps(fields).encode())


DEEP = b'{"format":' + 100_000 * b"["
CRAFTED = {
  "not JSON": (b"{", "is not JSON"),
  "empty": (b"", "is not JSON"),
  "not UTF-8": (b'{"format": "\xff"}', "is not UTF-8"),
  "nested deeply": (DEEP, "nested too deeply"),
  "no object": (b"[1]", "is no JSON object"),
  "no format": (b"{}", "another version"),
  "nothing else": (b'{"format":1}', "header.length is missing"),
  "a coding that is none": (b'{"format":1,"length":0,"digest":"","coding":3}', "header.coding must be a group of keys"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_header_is_one_line(model, name):
  header, message = CRAFTED[name]
  packed = with_header(compression.compress(model, b""), header)
  with pytest.raises(DataError, match=message) as error:
    compression.decompress(model, packed)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"length": -1}, "header.length must not be negative"),
    ({"length": 10**15}, r"is not that of a text of 1,000,000,000,000,000 bytes"),
    ({"length": 1e3}, "header.length must be a whole number"),
    ({"length": True}, "header.length must be a whole number"),
    ({"length": None}, "header.length is missing"),
    ({"length": 29}, "not what was compressed|not that of a text of 29 bytes|does not fit"),
    ({"batch": 0}, "header.coding.batch must be at least 1"),
    ({"batch": 10**12}, "is not that of a text"),
    ({"batch": None}, "header.coding.batch is missing"),
    ({"digest": 5}, "header.digest must be text"),
    ({"more": 1}, "unknown key header.more"),
  ],
)
@pytest.mark.usefixtures("always_coded")
def test_a_crafted_field_is_one_line(model, changes, message):
  packed = repacked(compression.compress(model, text_bytes()[:30]), **changes)
  with pytest.raises(DataError, match=message) as error:
    compression.decompress(model, packed)
  assert "\n" not in str(error.value)


@pytest.mark.usefixtures("always_coded")
def test_a_crafted_code_is_one_line(model):
  packed = compression.compress(model, text_bytes()[:30])
  _, code = compression.read(packed)
  crafted = [code[:n] for n in range(len(code))] + [code + b"x", bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f" + code[4:]]
  for bad in crafted:
    with pytest.raises(DataError):
      compression.decompress(model, with_header(packed, header_of(packed), bad))


@pytest.mark.usefixtures("always_coded")
def test_every_byte_of_the_header_may_be_wrong(model):
  text = text_bytes()[:12]
  packed = compression.compress(model, text)
  header, refused = header_of(packed), 0
  for place in range(len(header)):
    for flip in (0x01, 0x10, 0x80, header[place] ^ ord("9")):
      altered = bytearray(header)
      altered[place] ^= flip
      try:
        assert compression.decompress(model, with_header(packed, bytes(altered))) == text
      except (DataError, ConfigError) as error:
        refused += 1
        assert "\n" not in str(error)
  assert refused > 3 * len(header)  # else it is the step, or a 9 already


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
def test_other_models_and_circumstances_are_named(model):
  text = text_bytes()[:30]
  packed = compression.compress(model, text, step=7)
  assert compression.decompress(model, repacked(packed)) == text
  with pytest.raises(ConfigError, match=r"another model [0-9a-f]{16} .*step 7 of its run"):
    compression.decompress(model_of(MEGABYTE, seed=1), packed)
  with pytest.raises(ConfigError, match="another model"):
    compression.decompress(model_of(dataclasses.replace(MEGABYTE, activation="gelu")), packed)
  with pytest.raises(ConfigError, match=r"another xla_flags --xla_a --xla_b \(here .*; it can be decompressed"):
    compression.decompress(model, repacked(packed, xla_flags="--xla_a --xla_b"))
  for key, value in {"dtype": "bfloat16", "device": "TPU v5", "cores": 0, "jax": "0.1", "constriction": "9"}.items():
    with pytest.raises(ConfigError, match=rf"another {key} {value} \(here"):
      compression.decompress(model, repacked(packed, **{key: value}))
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


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of a few steps, and 100 kB of text."""
  folder = write_data(tmp_path_factory.mktemp("compress"))
  config = Config.from_dict(tiny_config.get_config())
  config = dataclasses.replace(
    config,
    data=DataConfig(train=str(folder / "train.txt"), validation=str(folder / "validation")),
    eval=EvalConfig(batch_size=64),
  )
  (folder / "long.txt").write_bytes(text_bytes()[:100_000])
  train.train(config, str(folder / "run"))
  return folder / "run"


def command(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, "argv", ["compress.py", *map(str, arguments)])
  compress.main()
  return capsys.readouterr().out


def test_the_commands_and_the_evaluation_agree_within_a_percent(workdir, monkeypatch, capsys):
  text, packed, back = (workdir.parent / name for name in ("long.txt", "long.mz", "back.txt"))
  said = command(monkeypatch, capsys, text, packed, "--workdir", workdir, "--batch-size=512", "--no-adapt")
  _, result = evaluate_command(monkeypatch, "--workdir", workdir, "--data", text, "--no-compressors")
  assert 8 * packed.stat().st_size / 100_000 == pytest.approx(result["bpb"], rel=0.01)
  header, code = compression.read(packed.read_bytes())
  assert len(code) * 8 == pytest.approx(result["nats"] / math.log(2), rel=1e-3)
  assert (header.coding.step, header.length) == (result["step"], 100_000)
  assert "100,000 bytes -> " in said and "bits per byte" in said
  command(monkeypatch, capsys, "--decompress", packed, back, "--workdir", workdir)
  assert back.read_bytes() == text.read_bytes()


def test_another_process_decompresses(workdir, tmp_path):
  """And an error there is one line, with nothing left behind."""
  (tmp_path / "a.txt").write_bytes(text_bytes()[:5000])
  for arguments in (["a.txt", "a.mz"], ["--decompress", "a.mz", "b.txt"]):
    *flags, source, out = arguments
    output, code = finish(
      start("-m", "megabyte_jax", "compress", *flags, tmp_path / source, tmp_path / out, f"--workdir={workdir}")
    )
    assert code == 0, output
  assert (tmp_path / "b.txt").read_bytes() == text_bytes()[:5000]
  packed = (tmp_path / "a.mz").read_bytes()
  (tmp_path / "short.mz").write_bytes(packed[:-5])
  (tmp_path / "other.mz").write_bytes(repacked(packed, model="0123456789abcdef"))
  for name, message in {"short.mz": "cut short or altered", "other.mz": "another model 0123456789abcdef"}.items():
    output, code = finish(
      start("-m", "megabyte_jax", "compress", "--decompress", tmp_path / name, tmp_path / "c", f"--workdir={workdir}")
    )
    assert code == 1 and "Traceback" not in output
    [line] = [line for line in output.splitlines() if "error: " in line]
    assert message in line
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mz", "a.txt", "b.txt", "other.mz", "short.mz"]


def test_the_command_says_what_it_stores(workdir, monkeypatch, capsys, tmp_path):
  (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(3000))
  said = command(monkeypatch, capsys, tmp_path / "noise", tmp_path / "packed", "--workdir", workdir)
  assert "stored as they are, for the model makes them no smaller" in said
  assert (tmp_path / "packed").stat().st_size <= 3128
  command(monkeypatch, capsys, "--decompress", tmp_path / "packed", tmp_path / "back", "--workdir", workdir)
  assert (tmp_path / "back").read_bytes() == (tmp_path / "noise").read_bytes()


@pytest.mark.skipif(not pathlib.Path("/dev/stdout").exists(), reason="standard output has no name here")
def test_standard_output_gets_the_file_alone(model, monkeypatch, capfdbinary, tmp_path):
  monkeypatch.setattr(trained_model, "load", lambda workdir, step: (model, None, 3))
  (tmp_path / "text").write_bytes(b"some text")
  compress.main([str(tmp_path / "text"), "/dev/stdout", "--workdir=run"])
  out, err = capfdbinary.readouterr()
  assert compression.decompress(None, out) == b"some text"
  assert b"9 bytes -> " in err


def test_a_folder_to_write_to_is_refused_at_once(workdir, monkeypatch, capsys, tmp_path):
  (tmp_path / "text").write_bytes(b"abc")
  with pytest.raises(ConfigError, match=f"OUT={tmp_path} is a folder"):
    command(monkeypatch, capsys, tmp_path / "text", tmp_path, "--workdir=no run")


def test_a_prompt_is_read_by_the_same_program_in_every_process(monkeypatch):
  """Without timing on a GPU, as each step."""
  options = []
  monkeypatch.setattr(entropy_coding, "platform", lambda: "gpu")
  monkeypatch.setattr(entropy_coding.jax, "jit", lambda f, compiler_options, **_: options.append(compiler_options) or f)
  for jitted in (entropy_coding._state_after, entropy_coding._step):
    jitted.__wrapped__()
  assert options == [{"xla_gpu_autotune_level": 0}] * 2


def test_the_command_says_which_file(workdir, monkeypatch, tmp_path):
  (tmp_path / "text").write_bytes(b"no compressed file")
  monkeypatch.setattr(sys, "argv", ["compress.py", "--decompress", str(tmp_path / "text"), "x", f"--workdir={workdir}"])
  with pytest.raises(DataError, match=r"text: this is no file that megabyte_jax\.compress wrote"):
    compress.main()
