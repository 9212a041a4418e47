"""Reports a training run: a line on the terminal, `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from megabyte_jax.display.event_file import EventFile
from megabyte_jax.display.progress import duration, human
from megabyte_jax.display.trackers import Tracker
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.object_stores import is_remote
from megabyte_jax.parallel.hardware import memory_in_use, peak_flops

METRICS_FILE = "metrics.jsonl"
_OF_STEPS = {"loss", "extra_loss"}  # what lines of training have, unlike those of evaluation
_REMOTE_SECONDS = 30.0  # object stores cannot append: there the file is written anew so often


class Metrics:
  """Measures the speed of training and records its metrics; only process 0 writes, all may call.

  `metrics.jsonl` holds one JSON object per line, each with `step`. Lines of `log` have `loss` (nats per byte), `bpb`,
  `learning_rate`, `grad_norm`, `bytes_per_second`, `flops_per_second`, `mfu`, `seconds` and `memory_bytes`. With
  subwords these are per byte of the original text, too, and `nats_per_token`, `tokens_per_second` and `bytes_per_token`
  come on top. Lines of `write` have the values that the caller gives. An unknown value is null.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    num_steps: int,
    bytes_per_step: int,
    start_step: int = 0,
    seconds: float = 0.0,
    flops_per_byte: float | None = None,
    devices: Sequence[jax.Device] | None = None,
    tensorboard: bool = True,
    tracker: Tracker | None = None,
  ):
    """Opens the files in `workdir` and removes lines of later steps, which the run repeats.

    That includes the evaluation of `start_step`, which comes after the checkpoint from which a run resumes.

    Args:
      workdir: the run's folder.
      num_steps: optimizer steps of the whole run.
      bytes_per_step: bytes, or tokens, that a batch predicts, over all devices.
      start_step: steps taken before the run stopped.
      seconds: training time before the run stopped.
      flops_per_byte: per byte or token of a training step, by `flops.flops_per_byte(..., training=True)`.
      devices: all devices that train, of every process; None takes `jax.devices()`.
      tensorboard: writes events to `workdir`/tensorboard, too.
      tracker: gets the same values.
    """
    self._tracker = tracker
    self._devices = list(jax.devices() if devices is None else devices)
    peaks = [peak_flops(device) for device in self._devices]
    known = [peak for peak in peaks if peak]
    self._peak = sum(known) if len(known) == len(peaks) else None
    self._num_steps, self._bytes_per_step, self._flops_per_byte = num_steps, bytes_per_step, flops_per_byte
    self._seconds_before, self._opened = seconds, time.monotonic()
    self._seconds_per_step: float | None = None  # smoothed, for the time left
    self.start(start_step)
    self._writes = jax.process_index() == 0
    self._path = epath.Path(workdir) / METRICS_FILE
    self._file = self._board = None
    if self._writes:
      self._lines = _keep_until(self._path, start_step)  # for `_rewrite`
      self._file = self._path.open("a") if not is_remote(self._path) else None
      self._flushed = time.monotonic()
      if tensorboard:
        self._board = EventFile(epath.Path(workdir) / "tensorboard", start_step + 1)

  def __enter__(self) -> Metrics:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @property
  def seconds(self) -> float:
    """Seconds of the run so far, earlier parts included; saved with each checkpoint."""
    return self._seconds_before + time.monotonic() - self._opened

  def start(self, step: int) -> None:
    """Restarts the measurement of speed at `step`; called when the first step is compiled and done."""
    self._clock, self._clock_step = time.monotonic(), step

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time of a `with` block, such as an evaluation, from the speed."""
    begin = time.monotonic()
    try:
      yield
    finally:
      self._clock += time.monotonic() - begin

  def log(
    self, step: int, *, loss: float, learning_rate: float, grad_norm: float, bytes_per_token: float | None = None
  ) -> dict[str, Any]:
    """Writes the metrics of `step` and prints them in one line.

    Args:
      step: steps taken; the speed covers the time since the previous call.
      loss: nats per byte.
      learning_rate: of that step.
      grad_norm: global norm of the gradient before clipping.
      bytes_per_token: of a model of subwords, on average since the previous call.

    Returns:
      The record that was written.
    """
    speed = self._speed(step)
    flops = speed * self._flops_per_byte if speed and self._flops_per_byte else None
    record = {
      "step": int(step),
      "loss": float(loss),
      "bpb": float(loss) / math.log(2),
      "learning_rate": float(learning_rate),
      "grad_norm": float(grad_norm),
      "bytes_per_second": speed * (bytes_per_token or 1) if speed else None,
      "flops_per_second": flops,
      "mfu": flops / self._peak if flops and self._peak else None,
      "seconds": round(self.seconds, 3),
      "memory_bytes": memory_in_use(self._devices),
    }
    if bytes_per_token:
      record |= {
        "nats_per_token": float(loss) * bytes_per_token,
        "tokens_per_second": speed,
        "bytes_per_token": bytes_per_token,
      }
    self._put(record)
    if self._writes:
      print(self._line(record), flush=True)
    return record

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes other values of `step`, such as {"validation_bpb": 1.23}, and prints nothing."""
    self._put({"step": int(step), **{name: float(value) for name, value in values.items()}})

  def flush(self) -> None:
    """Writes pending lines, so that the process may end without `close`."""
    with _naming(self._path):
      if self._writes and self._file is None:
        self._rewrite()
      if self._board is not None:
        self._board.flush()

  def close(self) -> None:
    """Writes pending lines and closes the files."""
    with contextlib.ExitStack() as closing:  # each of them, whatever the others raise
      closing.enter_context(_naming(self._path))
      for file in (self._file, self._board):
        if file is not None:
          closing.callback(file.close)
      self.flush()

  def _speed(self, step: int) -> float | None:
    """Returns bytes or tokens per second since the previous call; None if no step was taken."""
    seconds, steps = time.monotonic() - self._clock, step - self._clock_step
    self.start(step)
    if steps <= 0 or seconds <= 0:
      return None
    newest = seconds / steps
    self._seconds_per_step = newest if self._seconds_per_step is None else 0.8 * self._seconds_per_step + 0.2 * newest
    return self._bytes_per_step / newest

  def _line(self, record: Mapping[str, Any]) -> str:
    width = len(str(self._num_steps))
    parts = [
      f"step {record['step']:{width}}/{self._num_steps}",
      f"loss {record['loss']:.4f}",
      f"bpb {record['bpb']:.4f}",
      f"lr {record['learning_rate']:.1e}",
      f"grad {record['grad_norm']:.2f}",
    ]
    if record["bytes_per_second"]:
      parts.append(f"{human(record['bytes_per_second'], 'B/s'):>9}")
    if record.get("tokens_per_second"):
      parts.append(f"{human(record['tokens_per_second'], 'tokens/s')}")
    if record["flops_per_second"]:
      share = f" ({100 * record['mfu']:.1f}% of peak)" if record["mfu"] else ""
      parts.append(f"{human(record['flops_per_second'], 'FLOP/s')}{share}")
    if self._seconds_per_step is not None and record["step"] < self._num_steps:
      parts.append(f"{duration((self._num_steps - record['step']) * self._seconds_per_step)} left")
    if record["memory_bytes"]:
      parts.append(f"mem {human(record['memory_bytes'], 'B')}")
    return "  ".join(parts)

  def _put(self, record: Mapping[str, Any]) -> None:
    if not self._writes:
      return
    # JSON knows no NaN and no infinity.
    plain = {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}
    if self._tracker:
      self._tracker.log(record["step"], plain)
    line = json.dumps(plain) + "\n"
    with _naming(self._path):
      if self._file is not None:
        self._file.write(line)
        self._file.flush()  # another program may look on, and a killed run loses no more than a line
      else:
        self._lines.append(line)
        if time.monotonic() - self._flushed >= _REMOTE_SECONDS:
          self._rewrite()
      if self._board is not None:
        for name, value in record.items():
          if name != "step" and value is not None:
            self._board.put(record["step"], name, value)

  def _rewrite(self) -> None:
    self._path.write_text("".join(self._lines))
    self._flushed = time.monotonic()


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
  """Names a file in errors of the file system that name none, as that of a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = str(path)
    raise


def _keep_until(path: epath.Path, last_step: int) -> list[str]:
  """Removes broken lines of `path` and those after training's of `last_step`; returns the lines that stay."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not path.exists():
    return []
  text = path.read_bytes().decode(errors="replace")
  lines = [line for line in text.splitlines(keepends=True) if _stays(line, last_step)]
  if "".join(lines) != text:
    with replacing(path) as temporary:
      temporary.write_text("".join(lines))
  return lines


def _stays(line: str, last_step: int) -> bool:
  """Returns True if a line is whole and a run that goes on from `last_step` does not write it again."""
  try:
    record = json.loads(line) if line.endswith("\n") else {"step": math.inf}
    return record["step"] < last_step or (record["step"] == last_step and bool(record.keys() & _OF_STEPS))
  except (ValueError, KeyError, TypeError, RecursionError):
    return False
