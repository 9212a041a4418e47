"""A command that a signal or a kill ends, started again, ends with the same bits; one device, with dropout."""

import re
import signal

import pytest
from run_commands import assert_bitwise_equal, finish, metric_lines, saved_state, start, write_data

STEPS = 90  # more than the pipe of a halted reader holds, in progress lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("resume"))


def command(folder, workdir):
  return [
    "train.py",
    "--config=tests/tiny_config.py:1",
    f"--config.data.train={folder / 'train.txt'}",
    f"--config.num_steps={STEPS}",
    "--config.checkpoint.every_steps=10",
    f"--workdir={workdir}",
  ]


@pytest.fixture(scope="module")
def uninterrupted(folder):
  output, code = finish(start(*command(folder, folder / "whole")))
  assert code == 0, output
  assert [line["step"] for line in metric_lines(folder / "whole")] == list(range(1, STEPS + 1))
  return folder / "whole"


def stop_at(process, step, number):
  """Sends a signal when the progress line of `step` is there; the pipe holds some 40 more lines, not the whole run."""
  for line in process.stdout:
    if line.startswith("step ") and int(re.split(r"[ /]+", line)[1]) >= step:
      break
  process.send_signal(number)
  return finish(process)


def assert_same_run(workdir, uninterrupted):
  assert metric_lines(workdir) == metric_lines(uninterrupted)
  assert_bitwise_equal(saved_state(workdir), saved_state(uninterrupted))


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(folder, uninterrupted):
  workdir = folder / "sigterm"
  output, code = stop_at(start(*command(folder, workdir)), 10, signal.SIGTERM)
  assert code == 0, output
  stopped = re.search(r"stopped at step (\d+), which is saved in .*; the same command goes on from there", output)
  assert stopped and 10 <= int(stopped[1]) < STEPS, output
  assert saved_state(workdir)[0] == int(stopped[1])
  output, code = finish(start(*command(folder, workdir), fresh=True))  # compiles everything anew
  assert code == 0, output
  assert f"steps   {stopped[1]} of {STEPS} done" in output
  assert_same_run(workdir, uninterrupted)


@pytest.mark.slow
def test_after_kill_9(folder, uninterrupted):
  workdir = folder / "killed"
  output, code = stop_at(start(*command(folder, workdir)), 22, signal.SIGKILL)
  assert code == -signal.SIGKILL, output
  output, code = finish(start(*command(folder, workdir)))
  assert code == 0, output
  done = int(re.search(r"steps   (\d+) of", output)[1])
  assert 0 < done < STEPS and done % 10 == 0
  assert_same_run(workdir, uninterrupted)
