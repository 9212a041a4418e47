"""The command that compresses: what it says, refuses and writes, in this process and in another."""

import dataclasses
import math
import pathlib
import sys

import numpy as np
import pytest
import tiny_config
from compressed_files import repacked, text_bytes
from run_commands import evaluate_command, finish, start, write_data

import train
from megabyte_jax.checkpoints import exported, saved_config, trained_model
from megabyte_jax.commands import compress
from megabyte_jax.config import Config, DataConfig, EvalConfig
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.generation import compression


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of a few steps, and 100 kB of text."""
  folder = write_data(tmp_path_factory.mktemp("compress"))
  config = Config.from_dict(tiny_config.get_config("1"))
  config = dataclasses.replace(
    config,
    data=DataConfig(train=str(folder / "train.txt"), validation=""),
    eval=EvalConfig(batch_size=64),
  )
  (folder / "long.txt").write_bytes(text_bytes()[:100_000])
  train.train(config, str(folder / "run"))
  return folder / "run"


def command(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, "argv", ["compress.py", *map(str, arguments)])
  compress.main()
  return capsys.readouterr().out


@pytest.mark.slow
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


@pytest.mark.slow
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
  for name, message in {"short.mz": "cut short or altered", "other.mz": "with the model 0123456789abcdef"}.items():
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
  monkeypatch.setattr(
    saved_config, "load_config", lambda workdir: Config(model=model.config, batch_size=1, num_steps=3)
  )
  (tmp_path / "text").write_bytes(b"some text")
  compress.main([str(tmp_path / "text"), "/dev/stdout", "--workdir=run"])
  out, err = capfdbinary.readouterr()
  assert compression.decompress(None, out) == b"some text"
  assert b"9 bytes -> " in err


def test_an_existing_file_is_kept_unless_it_may_be_lost(model, monkeypatch, tmp_path):
  monkeypatch.setattr(trained_model, "load", lambda workdir, step: (model, None, 3))
  monkeypatch.setattr(
    saved_config, "load_config", lambda workdir: Config(model=model.config, batch_size=1, num_steps=3)
  )
  text, out = tmp_path / "text", tmp_path / "out"
  for path in (text, out):
    path.write_bytes(b"some text")
  with pytest.raises(ConfigError, match=f"OUT={out} exists; name another file, or give --force"):
    compress.main([str(text), str(out), "--workdir=run"])
  assert out.read_bytes() == b"some text"
  compress.main([str(text), str(out), "--workdir=run", "--force"])
  assert compression.decompress(None, out.read_bytes()) == b"some text"


def test_a_folder_to_write_to_is_refused_at_once(workdir, monkeypatch, capsys, tmp_path):
  (tmp_path / "text").write_bytes(b"abc")
  with pytest.raises(ConfigError, match=f"OUT={tmp_path} is a folder"):
    command(monkeypatch, capsys, tmp_path / "text", tmp_path, "--workdir=no run")


def test_the_command_says_which_file(workdir, monkeypatch, tmp_path):
  (tmp_path / "text").write_bytes(b"no compressed file")
  monkeypatch.setattr(sys, "argv", ["compress.py", "--decompress", str(tmp_path / "text"), "x", f"--workdir={workdir}"])
  with pytest.raises(DataError, match=r"text: this is not a file that `megabyte_jax compress` wrote"):
    compress.main()


def test_a_compressed_file_is_not_compressed_again_by_mistake(model, monkeypatch, tmp_path):
  monkeypatch.setattr(trained_model, "load", lambda workdir, step: (model, None, 3))
  monkeypatch.setattr(
    saved_config, "load_config", lambda workdir: Config(model=model.config, batch_size=1, num_steps=3)
  )
  for name, content in (("text", b"some text"), ("packed", compression.compress(model, b"some text"))):
    (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError, match=r"packed: this is a compressed file; give --decompress to restore it"):
    compress.main([str(tmp_path / "packed"), str(tmp_path / "twice"), "--workdir=run", "--force"])
  assert not (tmp_path / "twice").exists()


def test_files_that_a_run_which_goes_on_would_lose_are_told(workdir, monkeypatch, capsys, tmp_path):
  """And none of a finished run, an exported model, a step that is kept for good, or a file that needs no model."""
  (tmp_path / "text").write_bytes(b"some text " * 100)
  saved = saved_config.load_config(workdir)
  told = []
  for steps, keep_every_steps, exported_model in ((12, 0, False), (400, 0, False), (400, 6, False), (400, 0, True)):
    config = dataclasses.replace(
      saved, num_steps=steps, checkpoint=dataclasses.replace(saved.checkpoint, keep_every_steps=keep_every_steps)
    )
    monkeypatch.setattr(saved_config, "load_config", lambda workdir, config=config: config)
    monkeypatch.setattr(exported, "is_exported", lambda workdir, answer=exported_model: answer)
    compress.main([str(tmp_path / "text"), str(tmp_path / "out"), "--force", "--workdir", str(workdir)])
    told.append(capsys.readouterr().err)
  assert f"step 12 of {workdir}\n" in told[0] and f"step 12 of {workdir} (of 400 steps)\n" in told[1]
  assert ["notice" in text for text in told] == [False, True, False, False]
  assert "step 12 of 400 may be deleted when training goes on, and the file cannot be restored then" in told[1]
  assert f"python -m megabyte_jax export FOLDER --workdir={workdir} --step=12)" in told[1]
  monkeypatch.setattr(saved_config, "load_config", lambda workdir: dataclasses.replace(saved, num_steps=400))
  (tmp_path / "text").write_bytes(b"?")  # is stored
  monkeypatch.setattr(exported, "is_exported", lambda workdir: False)
  compress.main([str(tmp_path / "text"), str(tmp_path / "out"), "--force", "--workdir", str(workdir)])
  assert "notice" not in capsys.readouterr().err
