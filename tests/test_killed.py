"""kill -9 at any moment: the run resumes, and its loss curve is bitwise that of an undisturbed run."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, environment

KILLS = 20
STEPS = 2500
SAVE_EVERY = 25


def start(workdir, cache):
  arguments = [
    "train.py",
    "--config=tests/tiny_config.py",
    f"--workdir={workdir}",
    f"--config.num_steps={STEPS}",
    f"--config.checkpoint.every_steps={SAVE_EVERY}",
  ]
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.DEVNULL,
    stderr=(workdir.parent / "stderr.txt").open("a"),
  )


def last_step(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def saved_step(workdir):
  return max((int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0)


def half_written(workdir):
  return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def wait_until(process, condition):
  end = time.monotonic() + 300
  while not condition():
    assert process.poll() is None, "the run ended before it was killed: give it more steps"
    assert time.monotonic() < end
    time.sleep(0.0005)


def losses(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
  cache = tmp_path / "cache"
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  assert start(undisturbed, cache).wait() == 0
  dice = random.Random(0)
  in_saves = 0
  for kill in range(KILLS):
    process = start(killed, cache)
    # Some while it starts, most when it has taken some steps of its own, half of those while a checkpoint is written.
    if kill % 5 == 4:
      time.sleep(dice.uniform(0, 6))
    else:
      target = saved_step(killed) + dice.randint(1, 3 * SAVE_EVERY)
      wait_until(process, lambda: last_step(killed) >= target)  # noqa: B023  (called at once)
      if kill % 2:
        wait_until(process, lambda: half_written(killed))
        time.sleep(dice.uniform(0, 0.01))
    process.send_signal(signal.SIGKILL)
    process.wait()
    in_saves += bool(half_written(killed))
  assert 0 < last_step(killed) < STEPS
  assert in_saves >= 3, "no save was cut off: the test did not test what it says"
  assert start(killed, cache).wait() == 0
  assert losses(killed) == losses(undisturbed)
  assert len(losses(killed)) == STEPS
  assert "was left half-written when an earlier run ended" in (tmp_path / "stderr.txt").read_text()
