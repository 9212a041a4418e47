"""eval.py: its table, its JSON line, the files it writes, and what compressors need beside it."""

import dataclasses
import gzip
import json
import math
import pathlib
import re
import shutil
import subprocess
import types

import numpy as np
import pytest
import tiny_config
from run_commands import evaluate_command, finish, start, write_data

import eval as command
import train
from megabyte_jax.commands.eval import parse_arguments
from megabyte_jax.config import Config, DataConfig, EvalConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation.compressors import compress_all
from megabyte_jax.evaluation.evaluate import Evaluation
from megabyte_jax.evaluation.kept import name_of_data
from megabyte_jax.evaluation.perplexity import number_of_words
from megabyte_jax.evaluation.positions import write_positions
from megabyte_jax.evaluation.report import read_all

LEVELS = Config.from_dict(tiny_config.get_config()).model.levels[:1]  # quick to compile


def test_max_pixels_are_the_runs_unless_others_are_given():
  config = Config.from_dict(tiny_config.get_config())
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_pixels=123))
  for flags, expected in (([], 123), (["--max-pixels=456"], 456)):
    assert command.with_options(config, parse_arguments(["--workdir=x", *flags])).data.max_pixels == expected
  with pytest.raises(ConfigError, match="--max-pixels is -1; it must not be negative"):
    parse_arguments(["--workdir=x", "--max-pixels=-1"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def workdir(folder):
  """A finished run."""
  config = Config.from_dict(tiny_config.get_config())
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, levels=LEVELS),
    data=DataConfig(train=str(folder / "train.txt"), validation=str(folder / "validation")),
    eval=EvalConfig(batch_size=16),
    num_steps=15,
  )
  train.train(config, str(folder / "run"))
  return folder / "run"


def test_weights_in_eight_bits_are_scored_and_said(workdir):
  """The figure moves a little, and the file that tables are made of stays that of the weights as trained."""
  kept = workdir / "eval_validation_basic.json"
  before = kept.read_text() if kept.exists() else None
  flags = [f"--workdir={workdir}", "--method=basic", "--no-compressors", "--max-bytes=200"]
  made, as_trained = (json.loads(command.main([*flags, *more])) for more in (["--weights=int8"], []))
  assert made.pop("weights") == "int8" and "weights" not in as_trained
  assert 0 < abs(made["nats"] - as_trained["nats"]) < 0.01 * as_trained["nats"]
  command.main([f"--workdir={workdir}", "--method=basic", "--no-compressors", "--weights=int8"])
  assert (kept.read_text() if kept.exists() else None) == before


def test_the_command_itself(workdir):
  output, code = finish(start("eval.py", "--workdir", workdir, "--method=sliding"))
  assert code == 0, output
  lines = output.splitlines()
  result = json.loads(lines[-1])
  assert result["bytes"] == 1000
  assert result["bpb"] == pytest.approx(result["nats"] / 1000 / math.log(2))
  assert result["seconds"] > 0
  assert (result["split"], result["method"], result["cost"], result["step"]) == ("validation", "sliding", 1.944, 15)
  assert json.loads((workdir / "eval.json").read_text()) == result
  for compressor in ("gzip -9", "bzip2 -9", "xz -9e"):
    (line,) = [line for line in lines if line.strip().startswith(compressor)]
    assert "primed with the training data" in line
  assert (workdir / "eval_by_context.png").read_bytes()[:4] == b"\x89PNG"
  positions = json.loads((workdir / "eval_positions.json").read_text())
  assert sum(positions["context_bytes"]) == sum(positions["patch_bytes"]) == 1000
  assert len(positions["context"]) == 32 and len(positions["patch"]) == 4


def test_a_run_trained_with_an_attention_that_cannot_serve_here(workdir, monkeypatch, tmp_path):
  shutil.copytree(workdir, tmp_path / "run")
  saved = json.loads((tmp_path / "run/config.json").read_text())
  saved["model"]["attention"] = "cudnn"
  (tmp_path / "run/config.json").write_text(json.dumps(saved))
  _, there = evaluate_command(monkeypatch, "--workdir", tmp_path / "run", "--no-compressors")
  _, here = evaluate_command(monkeypatch, "--workdir", workdir, "--no-compressors")
  assert there["nats"] == here["nats"]


def test_per_byte_nats_sum_up(workdir, folder, tmp_path, monkeypatch):
  file = tmp_path / "new" / "nats.npy"
  _, result = evaluate_command(monkeypatch, "--workdir", workdir, "--per-byte-out", file)  # its folder is made
  nats = np.load(file)
  assert nats.dtype == np.float32 and nats.shape == (1000,)
  assert nats.sum(dtype=np.float64) == pytest.approx(result["nats"], rel=1e-9)
  # Documents are scored apart, in their order.
  for name, part in (("a.txt", nats[:700]), ("b.txt", nats[700:])):
    _, alone = evaluate_command(monkeypatch, "--workdir", workdir, "--data", folder / "validation" / name)
    assert alone["nats"] == pytest.approx(part.sum(dtype=np.float64), rel=1e-5)
  assert [path.name for path in file.parent.iterdir()] == ["nats.npy"]

  lines, first = evaluate_command(
    monkeypatch, "--workdir", workdir, "--per-byte-out", file, "--max-bytes=90", "--force"
  )
  assert first["bytes"] == 90
  np.testing.assert_allclose(np.load(file)[:64], nats[:64], rtol=1e-5)
  assert np.isnan(np.load(file)[90:]).all() and not np.isnan(np.load(file)[:90]).any()
  assert not any("gzip" in line for line in lines)  # they would be of all bytes


def test_per_byte_out_must_be_a_file_that_can_be_written(workdir, tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  wrong = {
    "gs://bucket/nats.npy": "is not on this machine's disks",
    tmp_path: "is a folder; name a file",
    tmp_path / "file" / "nats.npy": "is a file, not a folder",
  }
  for path, what in wrong.items():
    with pytest.raises(ConfigError, match=what):
      evaluate_command(monkeypatch, "--workdir", workdir, "--per-byte-out", path)


def test_splits_batches_and_choices(workdir, monkeypatch):
  _, result = evaluate_command(monkeypatch, "--workdir", workdir)
  for batch_size in (3, 40):
    _, other = evaluate_command(monkeypatch, "--workdir", workdir, f"--batch-size={batch_size}", "--no-compressors")
    assert other["nats"] == pytest.approx(result["nats"], rel=1e-6)
  lines, on_train = evaluate_command(monkeypatch, "--workdir", workdir, "--split=train", "--no-compressors")
  assert (on_train["split"], on_train["bytes"]) == ("train", 20_000)
  assert not any("gzip" in line for line in lines)
  with pytest.raises(ValueError, match="no checkpoint of step 7 in"):
    evaluate_command(monkeypatch, "--workdir", workdir, "--step=7")


def test_words(workdir, folder, monkeypatch):
  texts = [(folder / "validation" / name).read_bytes() for name in ("a.txt", "b.txt")]
  words = sum(len(text.split()) for text in texts)
  assert words == len(b"".join(texts).split()) + 1  # a.txt ends and b.txt begins within a word
  _, counted = evaluate_command(monkeypatch, "--workdir", workdir, "--words=count")
  assert counted["words"] == words
  assert counted["word_perplexity"] == pytest.approx(math.exp(counted["nats"] / words))
  _, given = evaluate_command(monkeypatch, "--workdir", workdir, "--words=100")
  assert given["word_perplexity"] == pytest.approx(math.exp(given["nats"] / 100))
  lines, one = evaluate_command(monkeypatch, "--workdir", workdir, "--words=1")  # e to the power of some thousands
  assert one["word_perplexity"] is None and any("word-level perplexity inf" in line for line in lines)
  monkeypatch.setattr(command.report, "evaluate_and_print", lambda *_, **__: pytest.fail("that may have taken hours"))
  for words in ("some", "pg19-dev", "pg19validation", "0"):
    with pytest.raises(ConfigError, match=f"--words={words} is neither"):
      evaluate_command(monkeypatch, "--workdir", workdir, f"--words={words}")
  with pytest.raises(ConfigError, match="--words=pg19-test: 6,966,499 words cannot be those of "):
    evaluate_command(monkeypatch, "--workdir", workdir, "--words=pg19-test")
  with pytest.raises(ConfigError, match="--words and --max-bytes exclude each other"):
    evaluate_command(monkeypatch, "--workdir", workdir, "--words=count", "--max-bytes=50")


def test_official_numbers_of_words():
  long_text = types.SimpleNamespace(lengths=np.array([10**8]))
  assert number_of_words("pg19", "validation", long_text) == 3_007_061
  assert number_of_words("pg19", "test", long_text) == number_of_words("pg19-test", "", long_text) == 6_966_499
  with pytest.raises(ConfigError, match="which split is it"):
    number_of_words("pg19", "", long_text)


def test_evaluations_of_a_split_are_kept_by_split_and_method(workdir, monkeypatch):
  for path in workdir.glob("eval_*_*.json"):  # of the tests before
    path.unlink()
  for arguments in (
    (),
    ("--method=sliding",),
    ("--method=sliding", "--stride=4"),
    ("--split=train", "--max-bytes=64"),
    ("--data", workdir / "config.json"),
  ):
    evaluate_command(monkeypatch, "--workdir", workdir, "--no-compressors", *arguments)
  kept = {path.name: json.loads(path.read_text()) for path in workdir.glob("eval_*_*.json")}
  assert kept.keys() == {f"eval_validation_{name}.json" for name in ("basic", "sliding", "sliding_stride4")}
  assert kept["eval_validation_sliding_stride4.json"]["stride"] == 4
  assert kept["eval_validation_sliding.json"]["bpb"] < kept["eval_validation_basic.json"]["bpb"]


def test_nothing_is_lost_where_other_data_are_scored(workdir, folder, monkeypatch, tmp_path):
  """Each evaluation has a folder with what the work directory has of the newest."""
  run = shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("eval*"))
  monkeypatch.setattr(
    command.plots, "loss_by_position", lambda values, path, *_, **__: pathlib.Path(path).write_text(f"{values[:9]}")
  )
  texts = [folder / "validation" / "a.txt", tmp_path / "a.txt"]  # of one name
  texts[1].write_bytes(b"another text " * 30)
  commands = {
    "validation_basic": [],
    "train_basic_first64": ["--split=train", "--max-bytes=64"],
    "validation_sliding_stride4_raw": ["--method=sliding", "--stride=4", "--raw"],
    "validation_basic_int8": ["--weights=int8"],
    f"{name_of_data(str(texts[0]))}_basic": [f"--data={texts[0]}"],
    f"{name_of_data(str(texts[1]))}_basic": [f"--data={texts[1]}"],
  }
  lines, files = {}, {}
  names = ("eval.json", "eval_positions.json", "eval_by_context.png")
  for name, flags in commands.items():
    lines[name] = command.main([f"--workdir={run}", "--no-compressors", *flags])
    files[name] = [(run / file).read_text() for file in names]
  assert len(set(map(tuple, files.values()))) == len(commands)
  assert {path.name for path in (run / "evaluations").iterdir()} == commands.keys()
  for name in commands:
    assert [(run / "evaluations" / name / file).read_text() for file in names] == files[name]
    assert files[name][0] == lines[name] + "\n"


def test_names_of_data_suit_every_file_system():
  odd = "/a/b c:\n\udcff/\u4e2d" + "x" * 300, "hf:corpora/saved:test", "a/*.txt,b/", "/", ".."
  for spec in odd:
    assert re.fullmatch(r"([\w.]+(-[\w.]+)*-)?[0-9a-f]{8}", name_of_data(spec)), spec
  assert name_of_data("x/notes.txt").startswith("notes.txt-") and name_of_data("hf:a/b:test").startswith("b-test-")
  assert len({name_of_data(spec) for spec in (*odd, "x/a", "y/a", "a")}) == len(odd) + 3


def test_long_contexts_are_written_in_bins(tmp_path):
  context = 10_000
  nats, counts = np.arange(context) * np.log(2), np.ones(context)
  zeros = np.zeros(1)
  result = Evaluation("basic", zeros, zeros, nats, counts, np.ones(4), np.ones(4))
  write_positions(str(tmp_path), result)
  positions = json.loads((tmp_path / "eval_positions.json").read_text())
  assert positions["context_bin_width"] == 3 and sum(positions["context_bytes"]) == context
  np.testing.assert_allclose(positions["context"][:3], [1, 4, 7])
  for name in ("eval_by_context.png", "eval_by_patch.png"):
    assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_a_result_that_cannot_be_kept_is_still_told(workdir, monkeypatch, capsys):
  def refuse(*_):
    raise PermissionError(13, "Permission denied", "eval_positions.json")

  monkeypatch.setattr(command, "write_positions", refuse)
  _, result = evaluate_command(monkeypatch, "--workdir", workdir, "--max-bytes=100")
  assert result["bytes"] == 100
  assert "warning: not all is kept in" in capsys.readouterr().err


# How many more bytes the tools write around the same streams.
TOOLS = {"gzip -9": 12, "bzip2 -9": 0, "xz -9e": 0}


@pytest.mark.parametrize("tool", TOOLS)
def test_compressors_need_what_the_tools_need(folder, tool):
  if not shutil.which(tool.split()[0]):
    pytest.skip(f"{tool.split()[0]} is not installed")
  train_text = read_all(open_path(str(folder / "train.txt"), DataConfig()))
  text = read_all(open_path(str(folder / "validation"), DataConfig()))
  assert text == b"".join((folder / "validation" / name).read_bytes() for name in ("a.txt", "b.txt"))

  def size(data):
    return len(subprocess.run([*tool.split(), "--stdout"], input=data, capture_output=True, check=True).stdout)

  found = compress_all(text, train_text)[tool]
  assert found.alone * len(text) / 8 == pytest.approx(size(text), abs=TOOLS[tool] + 1e-6)
  primed = size(train_text + text) - size(train_text)
  assert found.primed * len(text) / 8 == pytest.approx(primed, abs=TOOLS[tool] + 1e-6)
  assert found.primed < found.alone


def test_several_sources_are_shown_one_by_one_and_in_total(workdir, folder, monkeypatch):
  a, b = (f"{folder}/validation/{name}.txt" for name in "ab")
  lines, both = evaluate_command(monkeypatch, "--workdir", workdir, f"--data={a},{b}", "--no-compressors")
  alone = [evaluate_command(monkeypatch, "--workdir", workdir, f"--data={x}", "--no-compressors")[1] for x in (a, b)]
  assert [one["name"] for one in both["sources"]] == [a, b]
  assert [(one["bytes"], one["documents"]) for one in both["sources"]] == [(700, 1), (300, 1)]
  for one, expected in zip(both["sources"], alone, strict=True):
    assert one["bpb"] == pytest.approx(expected["bpb"], rel=1e-5) and "sources" not in expected
    assert any(line.endswith(f"{one['bpb']:.3f}   of {one['name']}, {one['bytes']:,} bytes") for line in lines)
  assert sum(one["bpb"] * one["bytes"] for one in both["sources"]) == pytest.approx(both["bpb"] * 1000)
  _, part = evaluate_command(monkeypatch, "--workdir", workdir, f"--data={a},{b}", "--no-compressors", "--max-bytes=9")
  assert [(one["name"], one["bytes"]) for one in part["sources"]] == [(a, 9)]


def test_compressed_data_are_scored_as_what_they_hold_unless_raw_is_given(workdir, folder, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  text = (folder / "validation" / "a.txt").read_bytes()
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text))
  options = ("--workdir", workdir, f"--data={tmp_path}/a.txt.gz", "--no-compressors")
  _, content = evaluate_command(monkeypatch, *options)
  _, raw = evaluate_command(monkeypatch, *options, "--raw")
  assert (content["bytes"], raw["bytes"]) == (700, len(gzip.compress(text)))
  assert content["bpb"] < raw["bpb"]
