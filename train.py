"""Trains a model; the whole loop is in this file.

python train.py                                             the quick start
python train.py --config=configs/NAME.py --workdir=DIR      a run of your own; the same command again resumes it
python train.py --config.batch_size=8 --config.model.levels[0].num_layers=6       any field can be changed
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Any

from megabyte_jax.commands import command_line
from megabyte_jax.commands.train import parse_arguments

if __name__ == "__main__":  # before the imports below: --help and mistakes are answered at once
  ARGUMENTS = command_line.read(parse_arguments)

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.init_from import parameters_from
from megabyte_jax.checkpoints.saved_config import check_same_run, save_config
from megabyte_jax.config import Config
from megabyte_jax.data.batches import batches, open_windows
from megabyte_jax.data.open_data import open_source
from megabyte_jax.display import plots
from megabyte_jax.display.metrics import Metrics
from megabyte_jax.errors import CheckpointError, ConfigError
from megabyte_jax.evaluation import report, windows
from megabyte_jax.evaluation.evaluate import Evaluation, evaluate, make_eval_step
from megabyte_jax.files import outputs
from megabyte_jax.files.folder_lock import locked
from megabyte_jax.generation.samples import print_sample, write_samples
from megabyte_jax.models.flops import flops_per_byte, predicted_bytes
from megabyte_jax.parallel import distributed
from megabyte_jax.parallel.sharding import batch_sharding, check_mesh, make_mesh
from megabyte_jax.training.schedule import learning_rate
from megabyte_jax.training.state import TrainState, initial_state, make_train_step, restored_state


def train(config: Config, workdir: str, init_from: str = "") -> None:
  """Trains until `config.num_steps`, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: of the run.
    workdir: where checkpoints, metrics and pictures go.
    init_from: the folder of a run whose parameters a new run starts from; '' draws them.

  Raises:
    ConfigError: mesh, model, batch and evaluation do not suit each other, or the run did not start from `init_from`.
    DataError: the data cannot be read.
    CheckpointError: the run in `workdir` had other settings or data, is damaged, or another process trains in it.
    FloatingPointError: the loss or the parameters are no longer finite; what is saved is from before.
  """
  mesh = make_mesh(config.mesh)
  check_mesh(mesh, config.model, config.batch_size // config.accumulate)
  windows.check_method(config.model, config.eval.method)
  source = open_source(config.data, "train")
  validation = open_source(config.data, "validation") if config.data.validation else None
  cutting: dict[str, Any] = {
    "context": config.model.context,
    "seed": config.seed,
    "documents": config.data.documents,
    "latents": getattr(config.model, "latents", 0),
  }
  open_windows(source, **cutting)  # what is wrong with the data is said before anything is written
  with StopSignal() as stop:
    with contextlib.ExitStack() as closing:  # whatever happens, what is being written is finished
      if jax.process_index() == 0:
        busy = f"another process is training in {workdir}; wait until it ends, or take another --workdir"
        closing.enter_context(locked(workdir, CheckpointError(busy)))
      checkpoints = closing.enter_context(Checkpoints(workdir, config.checkpoint))
      first_step = checkpoints.latest_step() or 0
      data = batches(
        source,
        batch_size=config.batch_size,
        first_step=first_step,
        num_steps=config.num_steps,
        sharding=batch_sharding(mesh),
        vocab_size=config.model.vocab_size,
        **cutting,
      )
      fingerprints = source.fingerprint, validation.fingerprint if validation else ""
      state, meta = restore_or_start(config, mesh, checkpoints, fingerprints, workdir, init_from)
      origin = init_from or meta.get("init_from", "")
      save_config(workdir, config)
      print(report.describe_run(config, mesh, source, first_step), flush=True)
      metrics = closing.enter_context(
        Metrics(
          workdir,
          num_steps=config.num_steps,
          bytes_per_step=config.batch_size * predicted_bytes(config.model),
          start_step=first_step,
          seconds=meta["seconds"],
          flops_per_byte=flops_per_byte(config.model, training=True),
        )
      )
      train_step, eval_step = make_train_step(config), make_eval_step(config)
      scoring: dict[str, Any] = {"mesh": mesh, "eval_step": eval_step, "method": config.eval.method}
      most = config.eval.max_bytes  # during training
      schedule = learning_rate(config.optimizer, config.num_steps)
      # (step, its metrics): read one step late, while the devices are busy with the next.
      waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
      nats, count = meta["since_logged"]  # sums since the last progress line

      def read_metrics(leave: int) -> None:
        nonlocal nats, count
        while len(waiting) > leave:
          step, arrays = waiting.popleft()
          values = {name: float(array) for name, array in arrays.items()}
          check_finite(step, values, checkpoints, workdir)
          if step == first_step + 1:
            metrics.start(step)  # speed is measured from here on: compilation is over
          nats, count = nats + values["nats"], count + values["bytes"]
          if step % config.log_every == 0 or step == config.num_steps:
            rate = float(schedule(step - 1))
            metrics.log(step, loss=nats / count, learning_rate=rate, grad_norm=values["grad_norm"])
            nats = count = 0.0

      def save(step: int) -> None:
        check_finite(step, {"parameter_norm": float(norm(state.parameters))}, checkpoints, workdir)
        meta = {"config": config.to_dict(), "init_from": origin}
        meta |= {"fingerprint": fingerprints[0], "validation_fingerprint": fingerprints[1]}
        meta |= {"seconds": metrics.seconds, "since_logged": [nats, count]}
        checkpoints.save(step, state.parameters, state.opt_state, meta)

      def note(step: int, result: Evaluation) -> None:
        metrics.write(step, {"validation_bpb": result.bpb})
        checkpoints.record(step, result.bpb)

      def say_stopped(step: int) -> None:
        checkpoints.wait()
        print(f"stopped at step {step}, which is saved in {workdir}; the same command goes on from there")

      trace = closing.enter_context(Trace(config.profile_steps, workdir))
      with jax.set_mesh(mesh):
        for number, batch in data:
          # Before the next step, not after the last one: so a resumed run makes up for an evaluation that was cut off.
          if validation and number and config.eval.every_steps and number % config.eval.every_steps == 0:
            read_metrics(leave=0)
            try:
              with metrics.paused():
                result = evaluate(
                  config, state.parameters, validation, max_bytes=most, on_progress=stop.check, **scoring
                )
            except Interrupted:
              save(number)
              return say_stopped(number)
            note(number, result)
            print(f"step {number}: validation bpb {result.bpb:.4f} ({result.bytes:,} bytes)", flush=True)
          step = number + 1
          trace.before(step)
          state, values = train_step(state, batch.x_BT, batch.length_B if config.data.windows_may_be_short else None)
          waiting.append((step, values))
          trace.after(step, values)
          stopping = stop.requested or checkpoints.preempted(step)
          candidate = config.checkpoint.keep_best and config.eval.every_steps and step % config.eval.every_steps == 0
          saving = stopping or candidate or step == config.num_steps or checkpoints.should_save(step)
          read_metrics(leave=0 if saving else 1)  # nothing is saved that is not known to be finite
          if saving:
            save(step)
          if stopping and step < config.num_steps:
            return say_stopped(step)

      checkpoints.wait()
      metrics.flush()
      stop.all_is_saved(workdir)
      if validation:
        result = report.evaluate_and_print(config, state.parameters, validation, primer=lambda: source, **scoring)
        if most and config.eval.every_steps:  # earlier steps were scored on a part: the last one is, too
          result = evaluate(config, state.parameters, validation, max_bytes=most, **scoring)
        note(config.num_steps, result)
    picture = os.path.join(workdir, "loss.png")
    if jax.process_index() == 0:
      plots.loss_curve(os.path.join(workdir, "metrics.jsonl"), picture)
    print_sample(config, state.parameters, source)
    for path in write_samples(config, state.parameters, validation or source, workdir):
      print(f"samples: {path}")
    print(report.what_next(workdir, picture, config.data.form))


def restore_or_start(
  config: Config, mesh: Mesh, checkpoints: Checkpoints, fingerprints: tuple[str, str], workdir: str, init_from: str
) -> tuple[TrainState, dict[str, Any]]:
  """The state to train from, and what its checkpoint says of the run so far.

  Raises:
    ConfigError: the run in `workdir` did not start from `init_from`.
    CheckpointError: it had other settings or data, or is damaged; or there is nothing to start from in `init_from`.
  """
  if checkpoints.latest_step() is None:
    state = initial_state(config, mesh)
    if init_from:
      state = state._replace(parameters=parameters_from(init_from, state.parameters, config, mesh))
    return state, {"seconds": 0.0, "since_logged": (0.0, 0.0)}
  meta = checkpoints.meta()
  if init_from and init_from != meta.get("init_from"):
    raise ConfigError(
      f"{workdir} holds a run already, which did not start from {init_from}; take another --workdir, or drop the flag"
    )
  check_same_run(meta, config.to_dict(), *fingerprints)
  return restored_state(config, mesh, checkpoints), meta


norm = jax.jit(optax.tree.norm)


def check_finite(step: int, values: dict[str, float], checkpoints: Checkpoints, workdir: str) -> None:
  """Ends a run whose numbers are broken, before they reach a checkpoint.

  Raises:
    FloatingPointError: a value is not finite; names it, the last good checkpoint and what to change.
  """
  broken = ", ".join(f"{name} {value}" for name, value in values.items() if not np.isfinite(value))
  if not broken:
    return
  checkpoints.wait()
  good = checkpoints.latest_step()
  raise FloatingPointError(
    f"the numbers broke down at step {step}: {broken}. "
    + (f"The last good checkpoint, of step {good}, is kept in {workdir}. " if good else "No checkpoint was saved yet. ")
    + "Lower config.optimizer.learning_rate or raise config.optimizer.warmup_steps, and start anew in another --workdir"
    + (f" (with --init_from={workdir} from that checkpoint's parameters)" if good else "")
  )


class Interrupted(Exception):
  """An evaluation was broken off by a signal."""


class StopSignal:
  """`requested` turns true on SIGTERM (what schedulers send) or Ctrl-C; a second Ctrl-C stops at once.

  With several processes it never does: there JAX hears SIGTERM, and all agree on a step (`Checkpoints.preempted`).
  """

  def __init__(self):
    self.requested, self._finished = False, ""
    self._alone = jax.process_count() == 1
    heard = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)
    self._before = {number: signal.signal(number, self._on_signal) for number in heard}

  def __enter__(self) -> StopSignal:
    return self

  def __exit__(self, *_: object) -> None:
    while self._before:  # signals do again what they did before
      signal.signal(*self._before.popitem())

  def check(self, *_: object) -> None:
    """Raises Interrupted once a stop is requested; what a long evaluation calls as it goes."""
    if self.requested:
      raise Interrupted

  def all_is_saved(self, workdir: str) -> None:
    """From now on a signal ends the process at once, with exit code 0: only measuring and drawing are left."""
    self._finished = f"\nall steps are saved in {workdir}; the same command measures them again\n"
    if self.requested:
      self._end()

  def _end(self) -> None:
    os.write(2, self._finished.encode())  # print may not be called here
    distributed.end(0, at_once=True)  # an exception may be lost in a callback, or crash what is compiling

  def _on_signal(self, number, frame):
    if self._finished and self._alone:
      self._end()
    self.requested = self._alone
    if not self._alone:
      signal.raise_signal(signal.SIGTERM)
    os.write(2, b"\nstopping soon (Ctrl-C: at once, without saving)\n")
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Trace:
  """Records a device trace of steps first .. last in `workdir`/trace (for TensorBoard or Perfetto)."""

  def __init__(self, steps: tuple[int, ...], workdir: str):
    self._steps, self._folder, self._on = steps, os.path.join(workdir, "trace"), False

  def __enter__(self) -> Trace:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def before(self, step: int) -> None:
    """Starts the trace if `step` is to be in it."""
    if self._steps and not self._on and self._steps[0] <= step <= self._steps[1]:
      jax.profiler.start_trace(self._folder)
      self._on = True

  def after(self, step: int, results: Any) -> None:
    """Writes the trace if `step`, which computes `results`, is the last one in it."""
    if self._on and step == self._steps[1]:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self) -> None:
    if self._on:
      self._on = False
      jax.profiler.stop_trace()


def main(arguments: Sequence[str] | None = None) -> None:
  """Reads the arguments (None: the command line's) and trains as they say."""
  run(parse_arguments(arguments))


def run(args: argparse.Namespace) -> None:
  """Trains as the arguments that `parse_arguments` read say."""
  config = Config.from_dict(args.config)
  outputs.check_output_folder("--workdir", args.workdir)
  distributed.start_from_arguments(args)
  distributed.outlive_readers()
  train(config, args.workdir, args.init_from)


if __name__ == "__main__":
  command_line.run(lambda: run(ARGUMENTS))
