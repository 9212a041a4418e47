import io
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megabyte_jax.display import metrics as metrics_module
from megabyte_jax.display.metrics import Metrics
from megabyte_jax.display.progress import Progress, duration, human
from megabyte_jax.parallel.hardware import memory_in_use, peak_flops


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
  now = [50.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  return now


def open_metrics(workdir, **kwargs):
  return Metrics(workdir, **{"num_steps": 100, "bytes_per_step": 1000, "tensorboard": False} | kwargs)


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0, "0 B/s"),
    (7, "7 B/s"),
    (999, "999 B/s"),
    (999.7, "1.00 kB/s"),
    (1234, "1.23 kB/s"),
    (12_345, "12.3 kB/s"),
    (1.2e6, "1.20 MB/s"),
    (999_600, "1.00 MB/s"),
    (3.7e14, "370 TB/s"),
    (0.25, "0.25 B/s"),
    (-2500, "-2.50 kB/s"),
    (math.nan, "nan B/s"),
  ],
)
def test_human(value, text):
  assert human(value, "B/s") == text


def test_human_without_a_unit():
  assert human(1_300_000_000) == "1.30 G"
  assert human(12) == "12"


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (4.21, "4.2s"),
    (9.97, "10s"),
    (45, "45s"),
    (59.7, "1m00s"),
    (192, "3m12s"),
    (7500, "2h05m"),
    (273_600, "3d04h"),
    (math.inf, "?"),
  ],
)
def test_duration(seconds, text):
  assert duration(seconds) == text


@pytest.mark.parametrize(
  ("kind", "cores", "peak"),
  [
    ("TPU v4", 2, 275e12),
    ("TPU v4", 1, 137.5e12),
    ("TPU v5 lite", 1, 197e12),
    ("TPU v6 lite", 1, 918e12),
    ("TPU7x", 1, 1153.5e12),
    ("NVIDIA A100-SXM4-80GB", None, 312e12),
    ("NVIDIA H100 80GB HBM3", None, 989e12),
    ("NVIDIA H100 PCIe", None, 756e12),
    ("NVIDIA H200", None, 989e12),
    ("NVIDIA L4", None, 121e12),
    ("NVIDIA L40S", None, 362e12),
    ("NVIDIA RTX A1000", None, None),
    ("cpu", None, None),
  ],
)
def test_peak_flops(kind, cores, peak):
  device = types.SimpleNamespace(device_kind=kind, **({} if cores is None else {"num_cores": cores}))
  assert peak_flops(device) == peak


def test_memory_in_use():
  assert 10e6 < memory_in_use(jax.devices()) < 1e12
  gpu = types.SimpleNamespace(platform="gpu", process_index=0, memory_stats=lambda: {"peak_bytes_in_use": 5})
  silent = types.SimpleNamespace(platform="gpu", process_index=0, memory_stats=lambda: None)
  assert memory_in_use([gpu, silent]) == 5
  assert memory_in_use([silent]) is None


def test_speed_and_the_line(tmp_path, clock, capsys, monkeypatch):
  monkeypatch.setattr(metrics_module, "peak_flops", lambda device: 1e9)
  with open_metrics(tmp_path, flops_per_byte=2e6, devices=jax.devices()[:1], start_step=9, seconds=500.0) as metrics:
    clock[0] += 30  # compiling
    metrics.start(10)
    clock[0] += 15
    with metrics.paused():
      clock[0] += 1000
    record = metrics.log(
      40, loss=jnp.float32(2 * math.log(2)), learning_rate=np.float32(1e-3), grad_norm=jnp.float32(0.5)
    )
  assert record["bytes_per_second"] == pytest.approx(2000)
  assert record["flops_per_second"] == pytest.approx(4e9)
  assert record["mfu"] == pytest.approx(4.0)
  assert record["bpb"] == pytest.approx(2.0)
  assert record["seconds"] == 1545.0
  line = capsys.readouterr().out
  for part in ("step  40/100", "bpb 2.0000", "lr 1.0e-03", "2.00 kB/s", "4.00 GFLOP/s (400.0% of peak)", "30s left"):
    assert part in line
  assert lines_of(tmp_path) == [record]


def test_what_is_unknown_is_left_out(tmp_path, capsys):
  with open_metrics(tmp_path) as metrics:
    record = metrics.log(0, loss=math.nan, learning_rate=1.0, grad_norm=math.inf)
  assert record["bytes_per_second"] is record["mfu"] is record["flops_per_second"] is None
  assert "/s" not in capsys.readouterr().out
  (line,) = lines_of(tmp_path)
  assert line["loss"] is line["bpb"] is line["grad_norm"] is None
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("appends", [True, False])
def test_resuming_cuts_off_what_is_done_again(tmp_path, monkeypatch, appends):
  monkeypatch.setattr(metrics_module, "is_remote", lambda path: not appends)
  with open_metrics(tmp_path) as metrics:
    for step in (10, 20, 30):
      metrics.log(step, loss=1.0, learning_rate=1.0, grad_norm=1.0)
      metrics.write(step, {"extra_loss": step})
      metrics.write(step, {"validation_bpb": step})
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 5, "lo')
  with open_metrics(tmp_path, start_step=20) as metrics:
    assert [line["step"] for line in lines_of(tmp_path)] == [10, 10, 10, 20, 20]
    metrics.log(30, loss=2.0, learning_rate=1.0, grad_norm=1.0)
  assert [line["step"] for line in lines_of(tmp_path)] == [10, 10, 10, 20, 20, 30]
  # Not the evaluation, which comes after the checkpoint of step 20.
  assert "loss" in lines_of(tmp_path)[3] and "extra_loss" in lines_of(tmp_path)[4]
  assert lines_of(tmp_path)[-1]["loss"] == 2.0
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_half_written_last_line_is_dropped_even_if_all_steps_stay(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
  open_metrics(tmp_path, start_step=9).close()
  assert lines_of(tmp_path) == [{"step": 1}]


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with open_metrics(tmp_path, tensorboard=True) as metrics:
    metrics.log(1, loss=1.0, learning_rate=1.0, grad_norm=1.0)
    metrics.write(1, {"validation_bpb": 1.0})
  assert capsys.readouterr().out == ""
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_events(tmp_path):
  with open_metrics(tmp_path, tensorboard=True) as metrics:
    metrics.write(3, {"validation_bpb": 1.5})
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"validation_bpb" in events.read_bytes()


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_on_a_terminal(clock):
  stream = Terminal()
  with Progress("scoring", 10_000, stream=stream) as progress:
    for _ in range(100):
      clock[0] += 0.0625  # exact in binary
      progress.add(100)
  updates = stream.getvalue().split("\r")
  assert len(updates) <= 1 + 6.25 / 0.25 + 2  # not one per call
  assert updates[2].startswith("scoring:   5%  500 B of 10.0 kB (1.60 kB/s), 5.9s left")
  assert updates[-1] == "scoring: 10.0 kB in 6.2s (1.60 kB/s)\x1b[K\n"


def test_progress_elsewhere_is_one_line_when_done():
  stream = io.StringIO()
  with Progress("generating", stream=stream) as progress:
    progress.add(5)
    assert stream.getvalue() == ""
  assert stream.getvalue().startswith("generating: 5 B in 0.0s")
  with pytest.raises(RuntimeError), Progress("failing", stream=(stream := io.StringIO())):
    raise RuntimeError
  with Progress("silent", stream=stream, enabled=False) as progress:
    progress.add(5)
  assert stream.getvalue() == ""


def test_progress_elsewhere_is_told_every_minute(clock):
  stream = io.StringIO()
  with Progress("scoring", 20_000, stream=stream) as progress:
    for _ in range(20):
      clock[0] += 8
      progress.add(1000)
  first, second, last = stream.getvalue().splitlines()
  assert first == "scoring:  40%  8.00 kB of 20.0 kB (125 B/s), 1m36s left"
  assert second.startswith("scoring:  80%") and last == "scoring: 20.0 kB in 2m40s (125 B/s)"


def test_progress_says_that_compiling_is_included(clock):
  stream = io.StringIO()
  with Progress("scoring", compiles=True, stream=stream) as progress:
    clock[0] += 4
    progress.add(10_000)
  assert stream.getvalue() == "scoring: 10.0 kB in 4.0s (2.50 kB/s, compilation included)\n"


def test_progress_of_unknown_length(clock):
  stream = Terminal()
  progress = Progress("reading", stream=stream)
  clock[0] += 2
  progress.add(3000)
  assert stream.getvalue() == "\rreading: 3.00 kB (1.50 kB/s), 2.0s\x1b[K"
