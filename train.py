"""Trains a model; the whole loop is in this file.

python train.py                                             the quick start
python train.py --config=configs/NAME.py --workdir=DIR      a run of your own; the same command again resumes it
python train.py --config.batch_size=8 --config.model.levels[0].num_layers=6       any field can be changed
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from megabyte_jax.commands import command_line
from megabyte_jax.commands.train import parse_arguments

if __name__ == "__main__":  # before the imports below: --help and mistakes are answered at once
  ARGUMENTS = command_line.read(parse_arguments)

import jax

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.same_folder import SameFolder
from megabyte_jax.checkpoints.saved_config import is_shipped, save_config
from megabyte_jax.config import Config
from megabyte_jax.data.batches import draw_batches, open_windows
from megabyte_jax.data.folders import inside_source
from megabyte_jax.data.open_data import open_source
from megabyte_jax.data.sources import Source
from megabyte_jax.data.subwords.source import check_vocabulary, token_lengths, with_checksum
from megabyte_jax.display import plots
from megabyte_jax.display.metrics import Metrics
from megabyte_jax.display.trackers import Tracker, check_tracker
from megabyte_jax.errors import CheckpointError, PlotError, require
from megabyte_jax.evaluation import kept, report, windows
from megabyte_jax.evaluation.evaluate import evaluate, make_eval_step
from megabyte_jax.evaluation.nats_of_each_byte import FirstBytes
from megabyte_jax.files import outputs
from megabyte_jax.files.folder_lock import locked
from megabyte_jax.generation.final_samples import print_sample, write_samples
from megabyte_jax.models.flops import flops_per_byte
from megabyte_jax.parallel import distributed
from megabyte_jax.parallel.backend import platform
from megabyte_jax.parallel.compilation_cache import keep_compiled_programs
from megabyte_jax.parallel.sharding import batch_sharding, check_mesh, make_mesh
from megabyte_jax.training.resume import resume_or_start
from megabyte_jax.training.saving import is_due, save
from megabyte_jax.training.state import make_train_step
from megabyte_jax.training.step_metrics import StepMetrics
from megabyte_jax.training.stop_signal import Interrupted, StopSignal
from megabyte_jax.training.trace import Trace


def train(config: Config, workdir: str, init_from: str = "") -> bool:
  """Trains until `config.num_steps`, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: of the run.
    workdir: where checkpoints, metrics and pictures go.
    init_from: the folder of a run whose parameters a new run starts from; '' draws them.

  Returns:
    Whether all steps are done; False where a signal stopped the run, which is saved.

  Raises:
    ConfigError: mesh, model, batch and evaluation do not suit each other, or the run did not start from `init_from`.
    DataError: the data cannot be read.
    CheckpointError: the run in `workdir` had other settings or data, is damaged, or another process trains in it.
    FloatingPointError: the loss or the parameters are no longer finite; what is saved is from before.
  """
  config = dataclasses.replace(config, data=with_checksum(config.data))
  mesh = make_mesh(config.mesh)
  check_mesh(mesh, config.model, config.batch_size // config.accumulate)
  for split in ("train", "validation"):
    inside = inside_source(workdir, getattr(config.data, split))
    require(not inside, f"--workdir={workdir} lies within the data {inside}, and would change them; take another place")
  windows.check_method(config.model, config.eval.method)
  check_tracker(config.tracker)
  source = open_source(config.data, "train")
  check_vocabulary(source, config.model.vocab_size)
  validation = open_source(config.data, "validation") if config.data.validation else None
  training_windows = open_windows(  # what is wrong with the data is said before anything is written
    source,
    context=config.model.context,
    seed=config.seed,
    documents=config.data.documents,
    latents=config.model.num_latents,
    consecutive_rows=config.batch_size if config.model.recurrent else 0,
  )
  # Whatever happens, what is being written is finished; the tracker, last, gets the pictures drawn from it.
  with StopSignal() as stop, contextlib.ExitStack() as ending, contextlib.ExitStack() as closing:
    if jax.process_index() == 0:
      busy = f"another process is training in {workdir}; wait until it ends, or take another --workdir"
      closing.enter_context(locked(workdir, CheckpointError(busy)))
    checkpoints = closing.enter_context(Checkpoints(workdir, config.checkpoint))
    start = resume_or_start(config, mesh, checkpoints, source, validation, init_from)
    state = start.state
    save_config(workdir, config)
    folder = closing.enter_context(SameFolder(workdir, config))
    print(report.describe_run(config, mesh, source, start.step, validation), flush=True)
    tracker = ending.enter_context(Tracker(config, workdir))
    metrics = closing.enter_context(
      Metrics(
        workdir,
        num_steps=config.num_steps,
        bytes_per_step=config.bytes_per_step,
        start_step=start.step,
        seconds=start.seconds,
        flops_per_byte=flops_per_byte(config.model, training=True),
        tracker=tracker,
      )
    )
    step_metrics = StepMetrics(config, metrics, checkpoints, start.step, start.since_logged)
    trace = closing.enter_context(Trace(config.profile_steps, workdir))
    train_step = make_train_step(config, token_lengths(source))
    scoring: dict[str, Any] = {"mesh": mesh, "eval_step": make_eval_step(config), "method": config.eval.method}
    data = draw_batches(
      training_windows,
      batch_size=config.batch_size,
      first_step=start.step,
      num_steps=config.num_steps,
      sharding=batch_sharding(mesh),
      vocab_size=config.model.vocab_size,
    )
    with jax.set_mesh(mesh):
      for done, batch in data:  # `done` steps are done before this one
        # Before the next step, not after the last one: so a resumed run makes up for an evaluation that was cut off.
        if validation and done and config.eval.every_steps and done % config.eval.every_steps == 0:
          step_metrics.read()
          try:
            with metrics.paused():
              result = evaluate(
                config,
                state.parameters,
                validation,
                max_bytes=config.eval.max_bytes,
                on_progress=stop.check,
                **scoring,
              )
          except Interrupted:
            folder.check()
            save(checkpoints, done, state, start.identity | step_metrics.so_far())
            say_stopped(checkpoints, done)
            return False
          metrics.write(done, {"validation_bpb": result.bpb})
          checkpoints.record(done, result.bpb)
          print(f"step {done}: validation bpb {result.bpb:.4f} ({result.bytes:,} bytes)", flush=True)

        step = done + 1
        trace.before(step)
        length_B = batch.length_B if config.windows_may_be_short else None
        state, values = train_step(state, batch.x_BT, length_B, batch.fresh_B)
        trace.after(step, values)
        step_metrics.put(step, values)
        stopping = stop.requested or checkpoints.preempted(step)
        saving = is_due(step, config, checkpoints) or stopping
        # Nothing is saved that is not known to be finite. A CPU begins no step before the last is done: what is read
        # a step late there would count as done a step late.
        step_metrics.read(leave=0 if saving or platform() == "cpu" else 1)
        if saving:
          folder.check()
          save(checkpoints, step, state, start.identity | step_metrics.so_far())
        if stopping and step < config.num_steps:
          say_stopped(checkpoints, step)
          return False

    checkpoints.wait()
    metrics.flush()
    stop.all_is_saved(workdir, evaluates=validation is not None)
    if validation:
      # Evaluations during training may have scored a part: that part of the last one is what they are compared with.
      part = FirstBytes(validation, config.eval.max_bytes if config.eval.every_steps else 0)
      result = report.evaluate_and_print(
        config, state.parameters, validation, primer=lambda: source, on_byte_nats=part.put, **scoring
      )
      if jax.process_index() == 0:
        kept.write_last_score(config, validation, result, workdir)
      metrics.write(config.num_steps, {"validation_bpb": part.bpb})
      checkpoints.record(config.num_steps, part.bpb)
    closing.close()  # metrics are whole before they are drawn
    finish(config, workdir, state.parameters, source, validation, tracker)
  return True


def say_stopped(checkpoints: Checkpoints, step: int) -> None:
  """Says, once it is true, that `step` is saved."""
  checkpoints.wait()
  print(f"stopped at step {step}, which is saved in {checkpoints.workdir}; the same command goes on from there")


def finish(
  config: Config, workdir: str, parameters: Any, source: Source, validation: Source | None, tracker: Tracker
) -> None:
  """Draws the loss curve, makes samples, and prints what to try next."""
  picture = os.path.join(workdir, "loss.png")
  if jax.process_index() == 0:
    try:
      plots.loss_curve(os.path.join(workdir, "metrics.jsonl"), picture)
    except PlotError as error:  # metrics that somebody removed are no reason for a finished run to fail
      print(f"warning: no loss curve: {error}", file=sys.stderr)
      picture = ""
    else:
      tracker.picture(picture)
  print_sample(config, parameters, source)
  for path in write_samples(config, parameters, validation or source, workdir):
    print(f"samples: {path}")
    if path.endswith(".png"):
      tracker.picture(path)
  print(report.what_next(workdir, picture, config.data))


def main(arguments: Sequence[str] | None = None) -> None:
  """Reads the arguments (None: the command line's) and trains as they say."""
  run(parse_arguments(arguments))


def run(args: argparse.Namespace) -> None:
  """Trains as the arguments that `parse_arguments` read say."""
  config = Config.from_dict(args.config)
  require(not is_shipped(args.workdir), f"--workdir={args.workdir} cannot be trained in; give it to --init_from")
  outputs.check_output_folder("--workdir", args.workdir)
  distributed.start_from_arguments(args)
  keep_compiled_programs()
  train(config, args.workdir, args.init_from)


if __name__ == "__main__":
  command_line.run(lambda: run(ARGUMENTS), outlive_readers=True)
