"""kill -9 at any moment: the run resumes, and its loss curve is bitwise that of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from run_commands import ROOT, environment

KILLS = 20
IN_SAVES = 5  # of them while a checkpoint is written, at least
STEPS = 2500
SAVE_EVERY = 25


def start(workdir, cache, output):
  """The running command; the file `output` gets a line for each step that this process takes."""
  arguments = [
    "train.py",
    "--config=tests/tiny_config.py",
    f"--workdir={workdir}",
    f"--config.num_steps={STEPS}",
    f"--config.checkpoint.every_steps={SAVE_EVERY}",
  ]
  with output.open("wb") as stdout, (workdir.parent / "stderr.txt").open("a") as stderr:
    return subprocess.Popen(
      [sys.executable, "-u", *arguments],
      cwd=ROOT,
      env=environment() | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
      stdout=stdout,
      stderr=stderr,
    )


def steps_taken(output):
  """By the process that writes `output`; a checkpoint of an earlier one is not its work."""
  return output.read_bytes().count(b"\nstep ")


def half_written(workdir):
  """Each checkpoint that is being written, or was when its process died: names alone may come again."""
  folder = workdir / "checkpoints"
  entries = os.scandir(folder) if folder.exists() else ()
  return {(entry.name, entry.inode()) for entry in entries if ".orbax-checkpoint-tmp" in entry.name}


def wait_until(process, condition, seconds=300.0):
  end = time.monotonic() + seconds
  while time.monotonic() < end and not condition():
    assert process.poll() is None, "the run ended before it was killed: give it more steps"
    time.sleep(0.0005)


def losses(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
  cache = tmp_path / "cache"
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  output = tmp_path / "output.txt"
  assert start(undisturbed, cache, output).wait() == 0
  assert steps_taken(output) == STEPS
  dice = random.Random(0)
  in_saves, steps = 0, []
  for kill in range(KILLS):
    before = half_written(killed)
    process = start(killed, cache, output)
    # Four while they start, the others after some steps of their own; eight of these while they write a checkpoint.
    target = dice.randint(1, 2 * SAVE_EVERY)
    wait_until(process, lambda: steps_taken(output) >= target, dice.uniform(0, 6) if kill % 5 == 4 else 300)  # noqa: B023
    if kill % 5 in (1, 3):
      wait_until(process, lambda: half_written(killed) - before)  # noqa: B023  (called at once)
      time.sleep(dice.uniform(0, 0.01))
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps.append(steps_taken(output))
    in_saves += bool(steps[-1] and half_written(killed) - before)
  print(f"{KILLS} kills after {steps} steps, {in_saves} of them while a checkpoint was written")
  assert sum(count > 0 for count in steps) >= KILLS - 4
  assert in_saves >= IN_SAVES, "too few saves were cut off: the test did not test what it says"
  assert start(killed, cache, output).wait() == 0
  assert 0 < steps_taken(output) < STEPS
  assert losses(killed) == losses(undisturbed)
  assert len(losses(killed)) == STEPS
  assert "was left half-written when an earlier run ended" in (tmp_path / "stderr.txt").read_text()
