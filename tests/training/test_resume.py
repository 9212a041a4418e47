"""An interrupted run ends with the same bits as one that was left alone: stopped at an exact step, on eight devices."""

import dataclasses
import os
import signal
from concurrent import futures

import numpy as np
import pytest
import tiny_config
from PIL import Image
from run_commands import (
  assert_bitwise_equal,
  metric_lines,
  saved_state,
  write_data,
)

import train
from megabyte_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, OptimizerConfig
from megabyte_jax.data.batches import open_windows
from megabyte_jax.data.open_data import open_source
from megabyte_jax.errors import CheckpointError, ConfigError, DataError
from megabyte_jax.training import stop_signal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def config(folder):
  config = Config.from_dict(tiny_config.get_config("1"))
  return dataclasses.replace(
    config,
    data=DataConfig(train=str(folder / "train.txt"), validation=str(folder / "validation")),
    eval=EvalConfig(every_steps=7),
    num_steps=15,
    log_every=5,
  )


def train_with_a_signal(config, workdir, step, number=signal.SIGTERM, **options):
  """Trains, and sends the signal to itself while `step` is prepared."""

  def signalling(*args, **kwargs):
    for before, batch in original(*args, **kwargs):
      if before + 1 == step:
        os.kill(os.getpid(), number)
      yield before, batch

  original = train.draw_batches
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "draw_batches", signalling)
    train.train(config, str(workdir), **options)


def test_progress_lines_and_evaluations_are_those_of_one_run(folder, config, tmp_path, capsys, hangups):
  train.train(config, str(tmp_path / "whole"))
  lines = metric_lines(tmp_path / "whole")
  assert [(line["step"], "loss" in line) for line in lines] == [
    (5, True),
    (7, False),
    (10, True),
    (14, False),
    (15, True),
    (15, False),
  ]
  handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  # A terminal is lost; then a progress line is half done, and an evaluation due.
  for step, number in ((4, signal.SIGHUP), (7, signal.SIGTERM), (13, signal.SIGINT)):
    train_with_a_signal(config, tmp_path / "stopped", step, number)
    assert f"stopped at step {step}, which is saved" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
  train.train(config, str(tmp_path / "stopped"))
  assert metric_lines(tmp_path / "stopped") == lines
  assert_bitwise_equal(saved_state(tmp_path / "stopped"), saved_state(tmp_path / "whole"))
  train.train(config, str(tmp_path / "stopped"))  # a finished run only measures again
  assert metric_lines(tmp_path / "stopped") == lines


@pytest.mark.parametrize("schedule", [pytest.param("wsd", marks=pytest.mark.slow), "constant"])
def test_a_longer_run_is_as_if_it_had_been_longer_from_the_beginning(schedule, config, tmp_path):
  optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule=schedule, decay_share=0.25)
  data = dataclasses.replace(config.data, validation="")
  config = dataclasses.replace(config, optimizer=optimizer, data=data, num_steps=12)
  train.train(config, str(tmp_path / "whole"))
  short = dataclasses.replace(config, num_steps=8)
  if schedule == "constant":
    train.train(short, str(tmp_path / "grown"))  # to its end
  else:
    train_with_a_signal(short, tmp_path / "grown", 6)  # the decay begins after it
  train.train(config, str(tmp_path / "grown"))
  assert_bitwise_equal(saved_state(tmp_path / "grown"), saved_state(tmp_path / "whole"))
  assert metric_lines(tmp_path / "grown")[-1]["step"] == 12
  with pytest.raises(CheckpointError, match=r"num_steps: 12 -> 11"):
    train.train(dataclasses.replace(config, num_steps=11), str(tmp_path / "grown"))


@pytest.mark.slow
def test_a_run_that_cannot_grow_says_which_can(config, tmp_path):
  data = dataclasses.replace(config.data, validation="")
  config = dataclasses.replace(config, data=data, num_steps=4)
  for schedule in ("linear", "wsd"):  # the latter's decay has begun
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule=schedule, decay_share=0.5)
    run = dataclasses.replace(config, optimizer=optimizer)
    train.train(run, str(tmp_path / schedule))
    with pytest.raises(CheckpointError, match=r"num_steps: 4 -> 9\n.*schedule=constant, or with wsd .*\n.*--init_from"):
      train.train(dataclasses.replace(run, num_steps=9), str(tmp_path / schedule))


@pytest.mark.slow
def test_muon_resumes_exactly_too(config, tmp_path):
  optimizer = OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=2, schedule="wsd", decay_share=0.5)
  data = dataclasses.replace(config.data, validation="")
  config = dataclasses.replace(config, optimizer=optimizer, data=data, num_steps=6)
  train.train(config, str(tmp_path / "whole"))
  train_with_a_signal(config, tmp_path / "stopped", 4)
  assert saved_state(tmp_path / "stopped")[0] == 4
  train.train(config, str(tmp_path / "stopped"))
  assert metric_lines(tmp_path / "stopped") == metric_lines(tmp_path / "whole")
  assert_bitwise_equal(saved_state(tmp_path / "stopped"), saved_state(tmp_path / "whole"))
  adamw = dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, name="adamw"))
  with pytest.raises(CheckpointError, match=r'optimizer\.name: "muon" -> "adamw"'):
    train.train(adamw, str(tmp_path / "stopped"))


def test_a_signal_during_an_evaluation_breaks_it_off_and_the_next_run_makes_up_for_it(folder, config, tmp_path, capsys):
  def signalling(*args, **kwargs):
    if not stopped:
      stopped.append(os.kill(os.getpid(), signal.SIGTERM))
    return original(*args, **kwargs)

  original, stopped = train.evaluate, []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "evaluate", signalling)
    train.train(config, str(tmp_path / "stopped"))
  assert "stopped at step 7, which is saved" in capsys.readouterr().out
  assert [line["step"] for line in metric_lines(tmp_path / "stopped")] == [5]
  train.train(config, str(tmp_path / "stopped"))
  steps = [(line["step"], "loss" in line) for line in metric_lines(tmp_path / "stopped")]
  assert steps == [(5, True), (7, False), (10, True), (14, False), (15, True), (15, False)]


@pytest.mark.parametrize("what", ["report.evaluate_and_print", "print_sample"])
def test_a_signal_after_the_last_step_loses_nothing(what, config, tmp_path, capfd):
  class Ended(BaseException):
    pass

  def end(code, at_once):
    assert (code, at_once) == (0, True)
    raise Ended

  def signalling(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the signal was not heard")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(f"train.{what}", signalling)
    patch.setattr(stop_signal.distributed, "end", end)
    with pytest.raises(Ended):
      train.train(config, str(tmp_path / "run"))
  assert "all steps are saved in" in capfd.readouterr().err
  assert saved_state(tmp_path / "run")[0] == 15


@pytest.mark.slow
def test_the_same_command_resumes_fine_tuning(config, tmp_path, capsys):
  data = dataclasses.replace(config.data, validation="")
  config = dataclasses.replace(config, data=data, num_steps=3)
  train.train(config, str(tmp_path / "first"))
  tuned, start = tmp_path / "tuned", {"init_from": str(tmp_path / "first")}
  train_with_a_signal(config, tuned, 1, **start)
  train_with_a_signal(config, tuned, 2)  # without the flag it goes on, too
  train.train(config, str(tuned), init_from=f"{tmp_path}/first/")  # however its path is written
  assert "steps   2 of 3 done" in capsys.readouterr().out
  with pytest.raises(ConfigError, match=r"did not start from x but from .*first; take another --workdir"):
    train.train(config, str(tuned), init_from="x")


def test_training_in_a_thread_hears_no_signals(config, tmp_path, capsys):
  """Python allows handlers in the main thread alone, whose signals are then the program's own."""
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=""), num_steps=3)
  handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(train.train, config, str(tmp_path / "run"))
    running.result()
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
  assert saved_state(tmp_path / "run")[0] == 3
  (tmp_path / "run" / "metrics.jsonl").write_text("")
  train.train(config, str(tmp_path / "run"))  # a finished run does not fail for want of a picture
  said = capsys.readouterr()
  assert "no loss curve" in said.err and "try next" in said.out


@pytest.mark.slow
def test_a_run_that_meets_a_bad_image_goes_on_as_it_is_advised(config, tmp_path, capsys):
  rng = np.random.default_rng(0)
  (tmp_path / "images").mkdir()
  for i in range(40):
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"images/{i:02}.png")
  model = dataclasses.replace(config.model, context=8 * 8 * 3)
  data = DataConfig(train=str(tmp_path / "images"), validation="", form="image", image_size=8)
  checkpoint = CheckpointConfig(every_steps=1)
  config = dataclasses.replace(config, model=model, data=data, checkpoint=checkpoint, batch_size=8, num_steps=5)
  windows = open_windows(open_source(data, "train"), context=8 * 8 * 3, seed=config.seed)
  bad = tmp_path / f"images/{windows.place_of(3 * 8).document:02}.png"  # the first of step 4
  bad.write_bytes(bad.read_bytes()[:100] + bytes(len(bad.read_bytes()) - 100))
  with pytest.raises(DataError, match=r"\.png.*skip and count all such images with --config\.data\.skip_bad=True"):
    train.train(config, str(tmp_path / "run"))
  step = saved_state(tmp_path / "run")[0]
  assert 1 <= step <= 3
  config = dataclasses.replace(config, data=dataclasses.replace(data, skip_bad=True))
  train.train(config, str(tmp_path / "run"))
  output = capsys.readouterr().out
  assert f"skip    1 items that cannot be read, from step {step} on" in output and f"steps   {step} of 5 done" in output
  assert saved_state(tmp_path / "run")[0] == 5
  train.train(config, str(tmp_path / "run"))  # once it skips, it is the same run
  bad.unlink()
  with pytest.raises(CheckpointError, match="images have changed"):
    train.train(config, str(tmp_path / "run"))


def test_what_does_not_continue_a_run_is_refused(folder, config, tmp_path):
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=""))
  train_with_a_signal(config, tmp_path / "run", 2)
  other = dataclasses.replace(
    config,
    seed=5,
    model=dataclasses.replace(config.model, dropout=0.2),
    optimizer=dataclasses.replace(config.optimizer, learning_rate=3.0),
  )
  with pytest.raises(CheckpointError) as error:
    train.train(other, str(tmp_path / "run"))
  for line in ("model.dropout: 0.1 -> 0.2", "optimizer.learning_rate: 0.01 -> 3.0", "seed: 0 -> 5", "--init_from=DIR"):
    assert line in str(error.value)
  assert "num_steps" not in str(error.value)


def test_other_bytes_in_the_same_file_are_refused(folder, config, tmp_path):
  text = (folder / "train.txt").read_bytes()
  data = tmp_path / "data.txt"
  data.write_bytes(text)
  config = dataclasses.replace(config, data=DataConfig(train=str(data), validation=""))
  train_with_a_signal(config, tmp_path / "run", 2)
  data.write_bytes(text[:-1] + b"#")
  with pytest.raises(CheckpointError, match=r"the files in .*data\.txt have changed since the run in .* began"):
    train.train(config, str(tmp_path / "run"))


# -- Numbers that break down --


@pytest.mark.parametrize(
  ("rate", "every_steps", "message"),
  [
    (1e30, 1, r"step 2: parameter_norm inf\. The last good checkpoint, of step 1, is kept in .*--init_from="),
    (1e30, 0, r"step 3: .*nan.*\. No checkpoint was saved yet\. Lower config\.optimizer\.learning_rate"),
  ],
)
def test_broken_numbers_end_the_run_with_the_last_good_checkpoint(config, tmp_path, rate, every_steps, message):
  config = dataclasses.replace(
    config,
    optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=5),
    checkpoint=CheckpointConfig(every_steps=every_steps),
    data=dataclasses.replace(config.data, validation=""),
  )
  with pytest.raises(FloatingPointError, match=message):
    train.train(config, str(tmp_path / "run"))
  if not every_steps:
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    return
  step, parameters, _ = saved_state(tmp_path / "run")
  assert step == 1
  sane = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=5), num_steps=3)
  train.train(sane, str(tmp_path / "next"), init_from=str(tmp_path / "run"))
  assert saved_state(tmp_path / "next")[0] == 3
