"""How commands end when a device, memory, a disk or another process is in the way, and how flags are spelt."""

import dataclasses
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from run_commands import ROOT, environment, run_each

from megabyte_jax.commands import command_line, strict_settings
from megabyte_jax.commands.arguments import Parser
from megabyte_jax.config import MeshConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.files.folder_lock import locked
from megabyte_jax.parallel.sharding import make_mesh

TINY = "--config=tests/tiny_config.py"


@pytest.mark.parametrize("wanted", ["cuda", "tpu"])
def test_a_device_that_is_not_there(wanted, tmp_path):
  here = environment() | {"JAX_PLATFORMS": wanted, "TPU_SKIP_MDS_QUERY": "1"}
  command = [sys.executable, "train.py", TINY, f"--workdir={tmp_path}"]
  result = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=False)
  if result.returncode == 0:
    pytest.skip(f"this machine has a {wanted}")
  assert result.returncode == 1 and "Traceback" not in result.stderr
  assert f"error: JAX finds no device of JAX_PLATFORMS={wanted}" in result.stderr


def test_flags_are_spelt_with_hyphens_or_underscores():
  parser = Parser("python test.py")
  parser.add_argument("file")
  parser.add_argument("--batch-size", type=int)
  parser.add_argument("--per-byte-out")
  expected = {"file": "my_file", "batch_size": 4, "per_byte_out": "a_b.npy"}
  assert vars(parser.parse_args(["--batch_size=4", "my_file", "--per_byte_out", "a_b.npy"])) == expected
  assert vars(parser.parse_args(["--batch-size=4", "my_file", "--per-byte-out=a_b.npy"])) == expected


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """Exit code and output of three commands, and the folder where another process trained meanwhile."""
  folder = tmp_path_factory.mktemp("ended")
  (folder / "ends.py").write_text("import sys\n\ndef get_config():\n  sys.exit(3)\n")
  commands = {"help": ["--help"], "config": [f"--config={folder / 'ends.py'}"]}
  commands["taken"] = [TINY, f"--workdir={folder / 'run'}"]
  (folder / "run").mkdir()
  taken = OSError("taken")
  with locked(str(folder / "run"), taken):
    with pytest.raises(OSError, match="taken"), locked(str(folder / "run"), taken):
      pass
    done = run_each({name: ["train.py", *given] for name, given in commands.items()}, folder / "outputs")
  return done, folder / "run"


def test_help_ends_well_and_a_config_file_as_it_says(ended):
  done, _ = ended
  assert (done["help"][0], done["config"][0]) == (0, 3)


def test_tracebacks_are_shown_when_they_are_wanted(monkeypatch, capsys):
  def main():
    raise ConfigError("the size is wrong")

  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards
  before = jax.config.values["jax_traceback_filtering"]
  for filtering in ("auto", "off"):
    jax.config.update("jax_traceback_filtering", filtering)
    with pytest.raises(SystemExit):
      command_line.run(main)
    shown = capsys.readouterr().err
    assert shown.endswith("error: the size is wrong\n")
    assert ('raise ConfigError("the size is wrong")' in shown) == (filtering == "off")
  jax.config.update("jax_traceback_filtering", before)


def test_settings_that_no_model_can_run_under_are_switched_off(monkeypatch, capsys):
  before = {name: jax.config.values[name] for name in ("jax_numpy_rank_promotion", "jax_transfer_guard")}
  monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
  monkeypatch.setenv("JAX_TRANSFER_GUARD", "disallow")
  monkeypatch.setenv("JAX_TRANSFER_GUARD_HOST_TO_DEVICE", "allow")
  try:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_transfer_guard", "disallow")
    strict_settings.switch_off()
    jax.jit(lambda x: x + jax.numpy.ones(3))(np.ones((2, 3)))
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
  assert capsys.readouterr().err == (
    "JAX_NUMPY_RANK_PROMOTION and JAX_TRANSFER_GUARD of the environment: not used here\n"
  )
  strict_settings.switch_off()  # also for the processes that this one starts
  assert capsys.readouterr().err == ""


def test_too_little_memory(monkeypatch, capsys):
  def main():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards
  with pytest.raises(SystemExit) as end:
    command_line.run(main)
  assert end.value.code == 1
  said = capsys.readouterr().err
  assert "error: too little memory (Out of memory allocating 5 bytes.); to train, raise" in said
  advised = {axis: int(size) for axis, size in re.findall(r"--config\.mesh\.(\w+)=(-?\d+)", said)}
  for mesh in (MeshConfig(), MeshConfig(data=1, seq=-1), MeshConfig(data=1, fsdp=-1)):  # all that is shipped
    assert make_mesh(dataclasses.replace(mesh, **advised)).shape["fsdp"] == jax.device_count()


def test_two_trainings_in_one_folder(ended):
  done, workdir = ended
  message = f"error: another process is training in {workdir}; wait until it ends, or take another --workdir\n"
  assert done["taken"] == (1, message)
  assert list(workdir.iterdir()) == []


@pytest.mark.slow
def test_a_checkpoint_for_which_there_is_no_room(tmp_path):
  program = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
  program += "runpy.run_path('train.py', run_name='__main__')"  # a disk takes no large file, as if it were full
  command = [sys.executable, "-c", program, TINY, f"--workdir={tmp_path}", "--config.sample_bytes=0"]
  result = subprocess.run(command, cwd=ROOT, env=environment(fresh=True), capture_output=True, text=True, check=False)
  assert result.returncode == 1
  assert result.stderr == (
    f"error: {tmp_path}/checkpoints: File too large; make room there, or move the run to another place; the checkpoint "
    "of step 12 was not saved, and there is none before: the same command starts anew\n"
  )
