"""Trains a model; the whole loop is in this file.

python train.py                                             the quick start
python train.py --config=configs/NAME.py --workdir=DIR      a run of your own; the same command again resumes it
python train.py --config.batch_size=8 --config.model.levels[0].num_layers=6       any field can be changed
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from megabyte_jax import command_line, plots, report
from megabyte_jax.checkpoint import Checkpoints, check_same_run, save_config
from megabyte_jax.config import Config, ConfigError
from megabyte_jax.data.batches import batches
from megabyte_jax.data.sources import open_source
from megabyte_jax.evaluate import evaluate
from megabyte_jax.fine_tune import parameters_from
from megabyte_jax.flops import flops_per_byte, predicted_bytes
from megabyte_jax.metrics import Metrics
from megabyte_jax.optimizer import learning_rate
from megabyte_jax.sharding import batch_sharding, make_mesh
from megabyte_jax.train_state import TrainState, abstract_state, initial_state, make_eval_step, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "What to train.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where checkpoints, metrics and pictures go.")
_INIT_FROM = flags.DEFINE_string("init_from", "", "Start a new run from the parameters of the run in this folder.")


def train(config: Config, workdir: str, init_from: str = "") -> None:
  """Trains until `config.num_steps`, from the newest checkpoint in `workdir` if there is one."""
  mesh = make_mesh(config.mesh)
  source = open_source(config.data, "train")
  validation = open_source(config.data, "validation") if config.data.validation else None
  checkpoints = Checkpoints(workdir, config.checkpoint)
  state, seconds = restore_or_start(config, mesh, checkpoints, source.fingerprint, workdir, init_from)
  first_step = int(state.step)
  save_config(workdir, config)
  print(report.describe_run(config, mesh, source, first_step), flush=True)

  train_step, eval_step = make_train_step(config), make_eval_step(config)
  schedule = learning_rate(config.optimizer, config.num_steps)
  metrics = Metrics(
    workdir,
    num_steps=config.num_steps,
    bytes_per_step=config.batch_size * predicted_bytes(config.model),
    start_step=first_step,
    seconds=seconds,
    flops_per_byte=flops_per_byte(config.model, training=True),
  )
  stop = StopSignal()
  may_be_short = config.data.documents == "whole" or not source.joinable
  data = batches(
    source,
    batch_size=config.batch_size,
    context=config.model.context,
    seed=config.seed,
    first_step=first_step,
    num_steps=config.num_steps,
    documents=config.data.documents,
    sharding=batch_sharding(mesh),
  )

  waiting = collections.deque()  # (step, its metrics): read one step late, while the devices are busy with the next
  nats = count = 0.0  # since the last progress line

  def read_metrics(leave: int) -> None:
    nonlocal nats, count
    while len(waiting) > leave:
      step, values = waiting.popleft()
      values = {name: float(value) for name, value in values.items()}
      check_finite(step, values, checkpoints, workdir)
      nats, count = nats + values["nats"], count + values["bytes"]
      if step % config.log_every == 0 or step == config.num_steps:
        rate = float(schedule(step - 1))
        metrics.log(step, loss=nats / count, learning_rate=rate, grad_norm=values["grad_norm"])
        nats = count = 0.0
      if step == first_step + 1:
        metrics.start(step)  # speed is measured from here on: compilation is over

  with jax.set_mesh(mesh):
    for number, batch in data:
      step = number + 1
      with trace(config.profile_steps, step, workdir):
        state, values = train_step(state, batch.x_BT, batch.length_B if may_be_short else None)
        waiting.append((step, values))
      stopping = stop.requested or checkpoints.preempted(step)
      evaluating = validation and config.eval.every_steps and step % config.eval.every_steps == 0
      saving = stopping or step == config.num_steps or checkpoints.should_save(step)
      read_metrics(leave=0 if saving or evaluating else 1)  # nothing is saved that is not known to be finite
      if saving:
        meta = {"config": config.to_dict(), "fingerprint": source.fingerprint, "seconds": metrics.seconds}
        checkpoints.save(step, state.parameters, state.opt_state, meta, force=True)
      if evaluating and not stopping and step < config.num_steps:
        with metrics.paused():
          result = evaluate(
            config, state.parameters, validation, mesh=mesh, eval_step=eval_step, max_bytes=config.eval.max_bytes
          )
        metrics.write(step, {"validation_bpb": result.bpb})
        print(f"step {step}: validation bpb {result.bpb:.4f} ({result.bytes:,} bytes)", flush=True)
      if stopping and step < config.num_steps:
        checkpoints.close()
        metrics.close()
        print(f"stopped at step {step}, which is saved in {workdir}; the same command goes on from there")
        return

  checkpoints.close()
  if validation:
    result = report.evaluate_and_print(config, state.parameters, validation, mesh, eval_step=eval_step, primer=source)
    metrics.write(config.num_steps, {"validation_bpb": result.bpb})
  metrics.close()
  picture = os.path.join(workdir, "loss.png")
  plots.loss_curve(os.path.join(workdir, "metrics.jsonl"), picture)
  report.print_sample(config, state.parameters, source)
  print(report.what_next(workdir, picture))


def restore_or_start(config, mesh, checkpoints, fingerprint, workdir, init_from) -> tuple[TrainState, float]:
  """The state to train from, and the seconds that went into it so far."""
  if checkpoints.latest_step() is None:
    state = initial_state(config, mesh)
    if init_from:
      state = state._replace(parameters=parameters_from(init_from, state.parameters, mesh))
    return state, 0.0
  if init_from:
    raise ConfigError(f"{workdir} holds a run already, so --init_from={init_from} would be ignored; drop one of them")
  meta = checkpoints.meta()
  check_same_run(meta, config.to_dict(), fingerprint)
  abstract = abstract_state(config, mesh)
  restored = checkpoints.restore(abstract.parameters, abstract.opt_state)
  step = jax.device_put(np.int32(restored.step), abstract.step.sharding)
  return TrainState(step, restored.params, restored.opt_state), meta["seconds"]


def check_finite(step: int, values: dict[str, float], checkpoints: Checkpoints, workdir: str) -> None:
  """Ends a run whose numbers are broken, before they reach a checkpoint."""
  if np.isfinite(values["nats"]) and np.isfinite(values["grad_norm"]):
    return
  checkpoints.close()
  raise FloatingPointError(
    f"at step {step} the loss is {values['nats'] / values['bytes']} and the gradient's norm {values['grad_norm']}; "
    f"the last good checkpoint is that of step {checkpoints.latest_step()} in {workdir}. Lower "
    "config.optimizer.learning_rate or raise warmup_steps, and start with --init_from or anew in another --workdir"
  )


class StopSignal:
  """`requested` turns true on SIGTERM (what schedulers send) or Ctrl-C; a second Ctrl-C stops at once."""

  def __init__(self):
    self.requested = False
    for name in (signal.SIGTERM, signal.SIGINT):
      signal.signal(name, self._on_signal)

  def _on_signal(self, number, frame):
    self.requested = True
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def trace(profile_steps: tuple[int, ...], step: int, workdir: str):
  """Records a device trace of steps first .. last in `workdir`/trace (for TensorBoard or Perfetto)."""
  if profile_steps and step == profile_steps[0]:
    jax.profiler.start_trace(os.path.join(workdir, "trace"))
  yield
  if profile_steps and step == profile_steps[1]:
    jax.block_until_ready(jax.live_arrays())
    jax.profiler.stop_trace()


def main(arguments: list[str]) -> None:
  """Reads the flags and trains."""
  if len(arguments) > 1:
    raise ConfigError(f"unexpected {' '.join(arguments[1:])}; flags begin with --")
  train(Config.from_dict(_CONFIG.value), _WORKDIR.value, _INIT_FROM.value)


if __name__ == "__main__":
  command_line.run(lambda: app.run(main, flags_parser=command_line.parse_config_flags))
