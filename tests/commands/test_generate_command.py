"""python -m megabyte_jax generate: text to the terminal, bytes to files, pictures and sounds completed."""

import io
import subprocess
import sys

import model_variants
import numpy as np
import pytest
import tiny_config
from PIL import Image
from run_commands import ROOT, environment

from megabyte_jax.checkpoints import trained_model
from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.saved_config import save_config
from megabyte_jax.commands import generate as command
from megabyte_jax.config import Config, DataConfig, Level, MegabyteConfig
from megabyte_jax.data.media import image_scaling
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.generation import sampling

SIZE = 8 * 8 * 3
LEVELS = (
  Level(patch_size=12, width=24, num_layers=1, num_heads=2),
  Level(patch_size=1, width=8, num_layers=1, num_heads=2),
)


def save_run(workdir, config):
  """An untrained run; samples need no optimizer state."""
  save_config(workdir, config)
  with Checkpoints(workdir) as checkpoints:
    checkpoints.save(1, model_variants.draw_parameters(config.model), {"count": np.int32(1)}, {})
  return workdir


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
  return save_run(tmp_path_factory.mktemp("text"), Config.from_dict(tiny_config.get_config("1")))


def media_run(folder, **data):
  model = MegabyteConfig(context=SIZE, levels=LEVELS, init_std=0.1)
  return save_run(folder, Config(model=model, data=DataConfig(**data), batch_size=8, num_steps=1))


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
  return media_run(tmp_path_factory.mktemp("image"), form="image", image_size=8, image_tiles=32)


@pytest.fixture(scope="module")
def audio_run(tmp_path_factory):
  return media_run(tmp_path_factory.mktemp("audio"), form="audio", sample_rate=1000, encoding="pcm16")


def run(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
  command.main()


@pytest.mark.parametrize(
  "spelling", [["megabyte_jax", "generate"], pytest.param(["megabyte_jax.generate"], marks=pytest.mark.slow)]
)
def test_the_command_itself(text_run, spelling):
  """Its output, redirected, is the bytes of the sample and nothing else."""
  command_line = ["-m", *spelling, f"--workdir={text_run}", "--prompt=abc", "--bytes=70"]
  done = subprocess.run(
    [sys.executable, *command_line], cwd=ROOT, env=environment(), capture_output=True, timeout=300, check=True
  )
  assert done.stdout.startswith(b"abc") and len(done.stdout) == 73
  said = done.stderr.decode()
  assert f"step 1 of {text_run}" in said and "70 bytes in " in said and "B/s" in said and "Warning" not in said


def test_samples_as_text_and_as_bytes(text_run, monkeypatch, capsysbinary, tmp_path):
  arguments = [f"--workdir={text_run}", "--prompt=abc", "--bytes=30", "--seed=3"]
  run(monkeypatch, *arguments)
  alone = capsysbinary.readouterr().out
  assert alone.startswith(b"abc") and len(alone) == 33
  with pytest.raises(UnicodeDecodeError):  # so it has something to spoil
    alone.decode()
  arguments += ["--num-samples=2"]
  run(monkeypatch, *arguments)
  shown = capsysbinary.readouterr().out
  assert shown.startswith(b"--- sample 0 ---\n" + alone + b"\n--- sample 1 ---\nabc")
  run(monkeypatch, *arguments, f"--output={tmp_path}/{{}}.bin")
  written = [(tmp_path / f"{i}.bin").read_bytes() for i in (0, 1)]
  assert all(text.startswith(b"abc") and len(text) == 33 for text in written) and written[0] != written[1]
  assert written[0] == alone and shown.endswith(written[1] + b"\n")
  (tmp_path / "prompt").write_bytes(b"abc\xff\0")
  run(
    monkeypatch,
    f"--workdir={text_run}",
    f"--prompt-file={tmp_path}/prompt",
    "--keep=0.7",
    "--bytes=9",
    "--output",
    tmp_path / "x.png",
  )
  assert (tmp_path / "x.png").read_bytes()[:3] == b"abc"
  assert (tmp_path / "x.png").stat().st_size == 12  # a model of text makes no pictures


@pytest.mark.parametrize("flags,expected", [([], ""), (["--weights=int8"], "int8")])
def test_weights_are_those_asked_for(flags, expected, text_run, monkeypatch, capsysbinary):
  given = []

  def generate(model, prompt, num_bytes, **options):
    given.append(options["weights"])
    return sampling.Generated(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.float32), np.ones(1, np.int64))

  monkeypatch.setattr(sampling, "generate", generate)
  run(monkeypatch, f"--workdir={text_run}", "--bytes=1", "--num-samples=1", *flags)
  assert given == [expected]


class Terminal(io.TextIOWrapper):
  def __init__(self, encoding):
    super().__init__(io.BytesIO(), encoding=encoding)

  def isatty(self):
    return True


def test_a_prompt_beyond_the_context_is_told(text_run, monkeypatch, capfd):
  for length in (32, 33):
    run(monkeypatch, f"--workdir={text_run}", f"--prompt={'x' * length}", "--bytes=1")
    told = "the model sees at most the last 32 of the prompt's 33 bytes" in capfd.readouterr().err
    assert told == (length == 33)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_terminal_shows_whole_characters(monkeypatch, encoding):
  """Wherever they are split, and whatever the terminal knows."""
  text = "aé漢😀\n".encode() + b"\xff\xc3(\xe6\xbc"
  expected = (text.decode(errors="replace") + "\n").encode(encoding, "replace")
  for cut in range(len(text) + 1):
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    output = command.Output()
    output.write(text[:cut])
    shown = terminal.buffer.getvalue()
    assert expected.startswith(shown)
    output.write(text[cut:])
    output.end()
    assert terminal.buffer.getvalue() == expected


def test_the_function_keeps_its_name_whatever_is_imported():
  """Though the command is called by the same name."""
  program = """
import importlib, sys
import megabyte_jax
public = megabyte_jax.generate
try:
  importlib.import_module("megabyte_jax.generate")
except ImportError:
  pass  # a spelling of python -m alone
from megabyte_jax import generate
importlib.import_module("megabyte_jax.commands.generate")
import megabyte_jax.generation.sampling
assert megabyte_jax.generate is generate is public is megabyte_jax.generation.sampling.generate
"""
  subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, check=True)


def test_a_sample_stops_at_a_text(text_run, monkeypatch, tmp_path):
  arguments = [f"--workdir={text_run}", "--prompt=abc", f"--output={tmp_path}/x"]
  run(monkeypatch, *arguments)
  whole = (tmp_path / "x").read_bytes()
  assert len(whole) == 403
  stop = next(whole[i : i + 1] for i in range(20, 403) if whole[i] < 128 and whole[i] > 32)
  run(monkeypatch, *arguments, f"--stop={stop.decode()}", "--force")
  assert (tmp_path / "x").read_bytes() == whole[: whole.index(stop, 3) + 1]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (r"\n", b"\n"),
    (r"end\n\n", b"end\n\n"),
    (r"\t\r\0\x1b\xFF", b"\t\r\0\x1b\xff"),
    (r"\\n", rb"\n"),
    (r"\d\x1", rb"\d\x1"),
    ("\\", b"\\"),
    ("\n", b"\n"),
    ("é\udcff", "é".encode() + b"\xff"),
    ("", b""),
  ],
)
def test_escapes_in_stop(text, expected):
  assert command.stop_bytes(text) == expected


@pytest.mark.slow
def test_output_that_nobody_reads(text_run, tmp_path):
  """Standard output is closed, as with `>&-`: bytes are lost, a file that is written is whole, and nothing is said."""
  for arguments in ([], [f"--output={tmp_path / 'x'}"]):
    flags = f"generate --workdir={text_run} --prompt=abc --bytes=20 {' '.join(arguments)}"
    done = subprocess.run(
      ["/bin/sh", "-c", f"{sys.executable} -m megabyte_jax {flags} >&-"],
      cwd=ROOT,
      env=environment(),
      capture_output=True,
      timeout=300,
      check=False,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
  assert (tmp_path / "x").stat().st_size == 23


def photograph(folder):
  """Twice as large as the model's images, and wider."""
  path = folder / "photo.PNG"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)).save(path)
  return path


def test_a_photograph_is_completed(image_run, monkeypatch, tmp_path):
  photo, out = photograph(tmp_path), tmp_path / "out.png"
  square = image_scaling.square_image(Image.open(photo), 8)
  run(monkeypatch, f"--workdir={image_run}", f"--prompt-file={photo}", f"--output={out}")
  made = np.asarray(Image.open(out))
  assert made.shape == (8, 8, 3)
  np.testing.assert_array_equal(made[:4], square[:4])
  assert (made[4:] != square[4:]).any()
  run(monkeypatch, f"--workdir={image_run}", f"--prompt-file={photo}", "--keep=1", "--output", out, "--force")
  np.testing.assert_array_equal(Image.open(out), square)


def test_a_grid_of_images(image_run, monkeypatch, tmp_path):
  photo, out = photograph(tmp_path), tmp_path / "grid.png"
  square = image_scaling.square_image(Image.open(photo), 8)
  run(monkeypatch, f"--workdir={image_run}", f"--prompt-file={photo}", "--num-samples=3", f"--output={out}")
  grid = np.asarray(Image.open(out))
  assert grid.shape == (22, 22, 3)  # two by two: the photograph, and three completions of it
  np.testing.assert_array_equal(grid[2:10, 2:10], square)
  for top, left in ((2, 12), (12, 2), (12, 12)):
    np.testing.assert_array_equal(grid[top : top + 4, left : left + 8], square[:4])
  run(monkeypatch, f"--workdir={image_run}", "--num-samples=3", f"--output={out}", "--force")
  assert Image.open(out).size == (22, 22)
  run(monkeypatch, f"--workdir={image_run}", "--num-samples=2", f"--output={tmp_path}/one_{{}}.png")
  assert all(Image.open(tmp_path / f"one_{i}.png").size == (8, 8) for i in (0, 1))


def test_a_recording_is_continued(audio_run, monkeypatch, tmp_path):
  soundfile = pytest.importorskip("soundfile")
  samples = np.random.default_rng(0).integers(-9000, 9000, 100, np.int16)
  clip, out = tmp_path / "clip.wav", tmp_path / "out.wav"
  soundfile.write(clip, samples, 1000, subtype="PCM_16")

  def made():
    x, rate = soundfile.read(out, dtype="int16")
    assert rate == 1000
    return x

  run(monkeypatch, f"--workdir={audio_run}", f"--prompt-file={clip}", "--bytes=60", f"--output={out}")
  np.testing.assert_array_equal(made()[:100], samples)
  assert made().size == 130
  run(monkeypatch, f"--workdir={audio_run}", f"--prompt-file={clip}", "--keep=0.255", f"--output={out}", "--force")
  np.testing.assert_array_equal(made()[:25], samples[:25])  # whole samples
  assert made().size == 100 and (made()[25:] != samples[25:]).any()


def test_wrong_arguments_are_told_before_anything_is_generated(text_run, image_run, audio_run, monkeypatch, tmp_path):
  def never(*_, **__):
    raise AssertionError

  monkeypatch.setattr(trained_model, "load", never)
  (tmp_path / "bad.png").write_bytes(b"\x89PNG")
  sound = tmp_path / "x.wma"
  sound.write_bytes(b"ID3")
  for error, message, *arguments in (
    (ConfigError, "not both", text_run, "--prompt=a", f"--prompt-file={tmp_path}/bad.png"),
    (ConfigError, "nothing does not exist", text_run, "--prompt-file=nothing"),
    (ConfigError, "is a folder; name one file", text_run, f"--prompt-file={tmp_path}"),
    (ConfigError, f"--output={tmp_path} is a folder", text_run, f"--output={tmp_path}"),
    (ConfigError, "bad.png is a file, not a folder", text_run, f"--output={tmp_path}/bad.png/x"),
    (ConfigError, "are written as PNG", image_run, "--output=x.JPG"),
    (ConfigError, "are written as WAV", audio_run, "--output=x.flac"),
    (ConfigError, "--keep is for --prompt-file", text_run, "--keep=0.5"),
    (ConfigError, "share to keep is 2", image_run, f"--prompt-file={tmp_path}/bad.png", "--keep=2"),
    (ConfigError, r"x\.wma is no audio file that can be decoded \(\.wav, ", audio_run, f"--prompt-file={sound}"),
    (ConfigError, "names one file for 2 samples", text_run, "--num-samples=2", "--output=x"),
    (ConfigError, "names one file for 2 samples", audio_run, "--num-samples=2", "--output=x.wav"),
    (ConfigError, "no text to print", image_run),
    (ConfigError, "--force is for --output", text_run, "--force"),
    (ConfigError, "100 bytes, prompt included, are not an image", image_run, "--output=x.png", "--bytes=100"),
    (ConfigError, "--stop is for models of text", image_run, "--output=x.png", "--stop=a"),
    (
      DataError,
      r"bad.png is not a whole JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF image \([^;]*\)$",  # nothing to skip
      image_run,
      "--output=x.png",
      f"--prompt-file={tmp_path}/bad.png",
    ),
    (ConfigError, "--mesh=x=3: 'x=3' is not the size", text_run, "--mesh=x=3"),
    (ConfigError, "does not fit 8 devices", text_run, "--mesh=fsdp=3"),
  ):
    workdir, *rest = arguments
    with pytest.raises(error, match=message):
      run(monkeypatch, f"--workdir={workdir}", *rest)


@pytest.mark.parametrize(("output", "existing"), [("out", "out"), ("{}.bin", "1.bin")])
def test_an_existing_file_is_kept_unless_it_may_be_lost(text_run, monkeypatch, tmp_path, output, existing):
  """Each of the numbered files; that is said before the run is looked at."""
  (tmp_path / existing).write_bytes(b"mine")
  arguments = ["--num-samples=2"] if "{}" in output else []
  arguments += ["--prompt=abc", "--bytes=9", f"--output={tmp_path}/{output}"]
  with pytest.raises(ConfigError, match=f"--output={tmp_path}/{existing} exists; name another file, or give --force"):
    run(monkeypatch, "--workdir=no run", *arguments)
  assert [path.name for path in tmp_path.iterdir()] == [existing]
  assert (tmp_path / existing).read_bytes() == b"mine"
  run(monkeypatch, f"--workdir={text_run}", *arguments, "--force")
  assert (tmp_path / existing).read_bytes().startswith(b"abc")


def test_a_model_spread_over_a_mesh(text_run, monkeypatch, tmp_path):
  arguments = [f"--workdir={text_run}", "--prompt=abc", "--bytes=30"]
  for name, more in {"one": [], "spread": ["--mesh=fsdp=2,tensor=-1"]}.items():
    run(monkeypatch, *arguments, *more, f"--output={tmp_path}/{name}")
  assert (tmp_path / "one").read_bytes() == (tmp_path / "spread").read_bytes()
