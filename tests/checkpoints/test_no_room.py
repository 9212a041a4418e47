"""A disk without room ends a run with one line: the folder, what was not saved, and which checkpoint is good."""

import asyncio
import errno
import gc
import os
import subprocess
import sys

import pytest
from run_commands import ROOT, environment

from megabyte_jax.checkpoints import failed_saves

SAVES = """
import resource, sys
import jax
import jax.numpy as jnp
from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.commands import command_line

def main():
  with Checkpoints(sys.argv[1]) as checkpoints:
    for step in range(1, 4):
      if step == 2:  # a disk takes no large file, as if it were full
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
      params = {str(i): jax.random.normal(jax.random.key(i), (100, 100)) for i in range(9)}
      checkpoints.save(step, params, {"count": jnp.int32(step)}, {})

command_line.run(main)
"""


def test_a_save_for_which_there_is_no_room(tmp_path):
  """Orbax's and TensorStore's threads tell of it, too; that is left out."""
  command = [sys.executable, "-c", SAVES, str(tmp_path)]
  result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
  assert result.returncode == 1
  assert result.stderr == (
    f"error: {tmp_path}/checkpoints: File too large; make room there, or move the run to another place; the checkpoint "
    "of step 2 was not saved, that of step 1 is good: the same command goes on from it\n"
  )


TRAINS = """
import os, sys, time
import jax
import tiny_config, train
from megabyte_jax.commands import command_line
from megabyte_jax.config import CheckpointConfig, Config
import dataclasses

config = dataclasses.replace(
  Config.from_dict(tiny_config.get_config()), num_steps=400, checkpoint=CheckpointConfig(every_steps=4)
)
folder, original = sys.argv[1], train.draw_batches

def filling(*arguments, **options):
  for done, batch in original(*arguments, **options):
    if done == int(sys.argv[2]):
      last = os.path.join(folder, "checkpoints", str(done // 4 * 4))
      while not os.path.exists(last):  # which is written meanwhile, and then renamed
        time.sleep(0.01)
      with open(os.path.join(os.path.dirname(folder), "rest"), "wb", buffering=0) as rest:
        try:
          while rest.write(bytes(4096)):
            pass
        except OSError:
          pass
    yield done, batch

train.draw_batches = filling
command_line.run(lambda: train.train(config, folder))
"""


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 2 MB of its own."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
  if mounted.returncode:
    pytest.skip("no file system can be mounted here")
  yield folder
  subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 9])
def test_a_disk_that_fills_up_while_training(small_disk, step):
  """Whatever meets it first: a checkpoint, the lines of metrics or TensorBoard's events."""
  workdir = small_disk / "run"
  command = [sys.executable, "-c", TRAINS, str(workdir), str(step)]
  variables = environment(fresh=True) | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
  result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=300)
  assert result.returncode == 1
  line = result.stderr.splitlines()[-1]
  assert line.startswith(f"error: {workdir}/") and ": No space left on device; make room there" in line
  assert f"that of step {step // 4 * 4} is good: the same command goes on from it" in line
  assert "Traceback" not in result.stderr


def test_errors_of_a_save_that_nobody_waits_for_are_left_out(caplog):
  loop = asyncio.new_event_loop()
  with failed_saves.quiet():
    pass
  tensorstore = ValueError("RESOURCE_EXHAUSTED: Error writing local file [os_error_code='28']")
  for error in (OSError(errno.ENOSPC, "No space left on device"), tensorstore, KeyError("of another's task")):
    future = loop.create_future()
    future.set_exception(error)
    del future
  gc.collect()
  loop.close()
  assert [type(record.exc_info[1]) for record in caplog.records] == [KeyError]
