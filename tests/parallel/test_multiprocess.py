"""Real processes over loopback: they train, save, stop, resume and evaluate as one."""

import json
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from flax import nnx
from processes import Processes, run

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.trained_model import load
from megabyte_jax.config import Config, MeshConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_source
from megabyte_jax.evaluation.evaluate import evaluate
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh
from megabyte_jax.training.state import abstract_state, initial_state, make_train_step

# Gloo between processes and XLA within one add the devices' gradients in different orders, so losses of one step agree
# to float32's 7 digits, and those after 12 steps of training a little less. Runs that are laid out alike are bitwise
# equal.
TOLERANCE = 2e-5


def losses(workdir):
  """{step: loss} of a run."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def flags(folder, workdir):
  return [
    "--config=tests/tiny_config.py:1",
    f"--config.data.train={folder / 'train.txt'}",
    f"--config.data.validation={folder / 'validation.txt'}",
    "--config.mesh.fsdp=2",
    "--config.eval.every_steps=6",
    "--config.checkpoint.keep_best=1",
    f"--workdir={folder / workdir}",
  ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  novel = pathlib.Path(SAMPLE_FOLDER, "text", "train", "moby_dick.txt").read_bytes()
  (folder / "train.txt").write_bytes(novel[30_000:50_000])
  (folder / "validation.txt").write_bytes(novel[60_000:60_700])
  return folder


@pytest.fixture(scope="module")
def two(folder):
  """The folder of a run of two processes with four devices each, and what they printed."""
  output = run(2, 4, "tests/record_reads.py", *flags(folder, "two"))
  return folder / "two", output


def config_of(workdir):
  return Config.from_dict(json.loads((workdir / "config.json").read_text()))


def loss_curve_here(config, devices):
  """{step: loss} of the same training in this process."""
  mesh = make_mesh(config.mesh, jax.devices()[:devices])
  state, train_step = initial_state(config, mesh), make_train_step(config)
  curve = {}
  with jax.set_mesh(mesh):
    for step, batch in batches(
      open_source(config.data, "train"),
      batch_size=config.batch_size,
      context=config.model.context,
      seed=config.seed,
      num_steps=config.num_steps,
      sharding=batch_sharding(mesh),
    ):
      state, values = train_step(state, batch.x_BT, None)
      curve[step + 1] = float(values["nats"]) / float(values["bytes"])
  return curve


def assert_close(curve, expected):
  assert curve.keys() == expected.keys()
  np.testing.assert_allclose([*curve.values()], [*expected.values()], rtol=TOLERANCE)


def test_two_processes_lose_as_one(two):
  assert_close(losses(two[0]), loss_curve_here(config_of(two[0]), 8))


def test_each_says_what_it_sees_and_one_speaks(two):
  for i, text in enumerate(two[1]):
    assert f"process {i} of 2 on " in text
    assert "4 x cpu here, 8 in all; coordinator localhost:" in text
  assert "step 12/12" in two[1][0]
  assert "step" not in two[1][1]
  assert "bits per byte" not in two[1][1]


def test_each_reads_its_rows_alone(two):
  first, second = (json.loads((two[0] / f"rows-{i}.json").read_text()) for i in range(2))
  assert {draw % 8 for draw in first} == {0, 1, 2, 3}
  assert {draw % 8 for draw in second} == {4, 5, 6, 7}
  assert sorted(first + second) == list(range(12 * 8))


def test_evaluation_totals_are_exact(two):
  config = config_of(two[0])
  mesh = make_mesh(config.mesh)
  best = json.loads((two[0] / "checkpoints" / "validation_bpb.json").read_text())
  for step, bpb in best.items():
    parameters = nnx.to_pure_dict(nnx.state(load(two[0], int(step), mesh)[0]))
    here = evaluate(config, parameters, open_source(config.data, "validation"), mesh=mesh)
    assert here.bytes == 700
    assert here.bpb == bpb
  assert best.keys() == {"6", "12"}


def test_a_joint_checkpoint_goes_from_mesh_to_mesh(two, tmp_path):
  config = config_of(two[0])
  reference = None
  workdir = two[0]
  meshes = [(8, MeshConfig(fsdp=2)), (4, MeshConfig(tensor=2)), (1, MeshConfig()), (8, MeshConfig(data=1, fsdp=8))]
  for i, (devices, mesh_config) in enumerate(meshes):
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    abstract = abstract_state(config, mesh)
    with Checkpoints(workdir, read_only=True) as checkpoints:
      restored = checkpoints.restore(abstract.parameters, abstract.opt_state, 12)
    assert restored.params["levels"][0]["embedder"]["table"].sharding.mesh.size == devices
    values = [np.asarray(leaf) for leaf in jax.tree.leaves((restored.params, restored.opt_state))]
    reference = reference or values
    for value, expected in zip(values, reference, strict=True):
      np.testing.assert_array_equal(value, expected)
    workdir = tmp_path / str(i)
    with Checkpoints(workdir) as checkpoints:
      checkpoints.save(12, restored.params, restored.opt_state, restored.meta)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step_and_they_resume_exactly(two, folder):
  """The signal comes before the first step, so that it is heard within the few there are."""
  arguments = ["train.py", *flags(folder, "stopped")]
  with Processes(2, 4, *arguments) as processes:
    processes.wait_for("process 1 of 2 on", process=1)  # JAX hears SIGTERM now
    processes.running[1].send_signal(signal.SIGTERM)
    output = processes.finish()
  assert "stopped at step " in output[0]
  at = max(losses(folder / "stopped"))
  assert f"stopped at step {at}," in output[0]
  assert 1 <= at < 12
  with Checkpoints(folder / "stopped", read_only=True) as checkpoints:
    assert checkpoints.latest_step() == at
  run(2, 4, *arguments)
  assert losses(folder / "stopped") == losses(two[0])


def test_eval_as_two_processes(two, folder):
  """Takes the best checkpoint; every process helps, and one writes."""
  per_byte = folder / "nats.npy"
  output = run(2, 4, "eval.py", f"--workdir={two[0]}", "--step=best", "--no-compressors", f"--per-byte-out={per_byte}")
  result = json.loads(output[0].strip().splitlines()[-1])
  best = json.loads((two[0] / "checkpoints" / "validation_bpb.json").read_text())
  assert result["bytes"] == 700
  assert result["step"] == int(min(best, key=best.get))
  assert result["bpb"] == min(best.values())
  nats = np.load(per_byte)
  assert nats.shape == (700,)
  assert nats.sum(dtype=np.float64) == pytest.approx(result["nats"], rel=1e-12)
  assert "bpb" not in output[1]


@pytest.mark.slow
def test_sigterm_ends_an_evaluation(two, folder):
  """As schedulers send it, to all. None may go on as if it had not heard it."""
  per_byte = folder / "ended.npy"
  arguments = ["eval.py", f"--workdir={two[0]}", "--step=12", f"--per-byte-out={per_byte}"]
  with Processes(2, 4, *arguments) as processes:
    processes.wait_for("process 1 of 2 on", process=1)
    processes.wait_for("process 0 of 2 on")
    for process in processes.running:
      process.send_signal(signal.SIGTERM)
    processes.finish(good=False)
  assert {process.returncode for process in processes.running} <= {-signal.SIGTERM, 128 + signal.SIGTERM}
  assert not [path for path in folder.iterdir() if "ended" in path.name]


@pytest.mark.slow
def test_a_second_interrupt_ends_a_process_that_waits_for_another(folder):
  """The other is halted in the middle of training, so that the first cannot even act on the first interrupt."""
  without_evaluation = [flag for flag in flags(folder, "interrupted") if "eval.every_steps" not in flag]
  without_evaluation.remove("--config.checkpoint.keep_best=1")
  arguments = ["train.py", *without_evaluation, "--config.num_steps=100000"]
  with Processes(2, 4, *arguments) as processes:
    processes.wait_for(" 9/100000")
    processes.running[1].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    for _ in range(2):
      processes.running[0].send_signal(signal.SIGINT)
      time.sleep(0.2)
    assert processes.running[0].wait(timeout=2) == 130, processes.all_output()
  assert "interrupted" in processes.output[0]


@pytest.mark.slow
def test_four_processes_take_over_from_two(two, folder):
  """From the checkpoint of step 6 that two processes wrote together."""
  run(2, 4, "train.py", *flags(folder, "four"), "--config.checkpoint.keep=2")
  shutil.rmtree(folder / "four" / "checkpoints" / "12")
  run(4, 2, "tests/record_reads.py", *flags(folder, "four"))
  assert_close(losses(folder / "four"), losses(two[0]))
  rows = [{draw % 8 for draw in json.loads((folder / "four" / f"rows-{i}.json").read_text())} for i in range(4)]
  assert rows == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


@pytest.mark.slow
def test_four_processes_lose_as_one(folder):
  run(4, 2, "train.py", *flags(folder, "four-alone"))
  assert_close(losses(folder / "four-alone"), loss_curve_here(config_of(folder / "four-alone"), 8))


@pytest.mark.slow
def test_one_that_fails_does_not_leave_the_others_waiting(folder):
  """Its data cannot be read, in the middle of training. The others end when JAX misses its heartbeat, after 100 s."""
  arguments = ["tests/record_reads.py", *flags(folder, "failed"), "--config.num_steps=100000"]
  with Processes(2, 4, *arguments, FAILING="1") as processes:
    processes.wait_for("the disk is gone", process=1)
    begin = time.monotonic()
    processes.finish(good=False)
  assert time.monotonic() - begin < 150
  assert processes.running[1].returncode == 1
  assert "error: the disk is gone" in processes.output[1]
