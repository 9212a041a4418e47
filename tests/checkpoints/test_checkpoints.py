import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.config import CheckpointConfig
from megabyte_jax.errors import CheckpointError

TX = optax.adamw(1e-3)


def make_state(scale=1.0):
  params = {
    "table": jnp.arange(256 * 8.0).reshape(256, 8) * scale,
    "levels": {"0": {"kernel": jnp.full((4, 3), float(scale)), "scale": jnp.ones(7, jnp.bfloat16)}},
  }
  return params, TX.init(params)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_steps(workdir, *steps, **config):
  with Checkpoints(workdir, CheckpointConfig(**{"keep": 9} | config)) as checkpoints:
    for step in steps:
      checkpoints.save(step, *make_state(step), {"config": {"a": 1}, "seconds": 1.5})


def array_files(workdir, step, item="params"):
  files = [path for path in (workdir / "checkpoints" / str(step) / item).rglob("d/*") if path.is_file()]
  return sorted(files, key=lambda path: -path.stat().st_size)


def test_restores_what_was_saved(tmp_path):
  save_steps(tmp_path, 5)
  params, opt_state = make_state(5)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 5
    restored = checkpoints.restore(abstract(params), abstract(opt_state))
    assert_same((restored.params, restored.opt_state), (params, opt_state))
    assert restored.step == 5
    assert checkpoints.meta() == {"config": {"a": 1}, "seconds": 1.5, "step": 5, "format": 1}


def test_parameters_alone_from_a_folder_that_is_only_read(tmp_path):
  save_steps(tmp_path, 1, 2)
  before = sorted(tmp_path.rglob("*"))
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    restored = checkpoints.restore_params(abstract(make_state()[0]), step=1)
    assert_same(restored.params, make_state(1)[0])
    assert restored.opt_state is None
    with pytest.raises(CheckpointError, match="read_only=False"):
      checkpoints.save(3, *make_state(3), {})
  assert sorted(tmp_path.rglob("*")) == before


def test_a_reader_follows_a_run_that_goes_on(tmp_path):
  with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as writer:
    writer.save(1, *make_state(1), {})
    writer.wait()
    with Checkpoints(tmp_path, read_only=True) as reader:
      assert reader.latest_step() == 1
      writer.save(2, *make_state(2), {})
      writer.wait()
      assert reader.restore_params(abstract(make_state()[0])).step == 2


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_restores_onto_another_mesh(tmp_path):
  save_steps(tmp_path, 5)
  mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  params, _ = make_state(5)
  wanted = abstract(params)
  sharding = NamedSharding(mesh, P("fsdp"))
  wanted["table"] = jax.ShapeDtypeStruct((256, 8), jnp.float32, sharding=sharding)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    restored = checkpoints.restore_params(wanted)
  assert restored.params["table"].sharding == sharding
  assert_same(restored.params, params)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  overwrite = jax.jit(lambda x: jnp.sin(x) + 1, donate_argnums=0)
  x = jnp.arange(2_000_000.0)
  expected = np.array(x)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": x}, make_state()[1], {})
    for _ in range(3):
      x = overwrite(x)
    x.block_until_ready()
    wanted = {"x": jax.ShapeDtypeStruct(expected.shape, jnp.float32)}
    np.testing.assert_array_equal(checkpoints.restore_params(wanted).params["x"], expected)


def test_every_differing_array_is_named(tmp_path):
  save_steps(tmp_path, 5)
  params, opt_state = make_state()
  wanted = abstract(params)
  wanted["table"] = jax.ShapeDtypeStruct((256, 16), jnp.float32)
  wanted["levels"]["0"]["scale"] = jax.ShapeDtypeStruct((7,), jnp.float32)
  wanted["levels"]["0"]["bias"] = wanted["levels"]["0"].pop("kernel")
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
    checkpoints.restore(wanted, abstract(opt_state))
  for line in (
    "params: table: float32[256, 8] -> float32[256, 16]",
    "params: levels.0.scale: bfloat16[7] -> float32[7]",
    "params: levels.0.kernel: float32[4, 3] -> (absent)",
    "params: levels.0.bias: (absent) -> float32[4, 3]",
  ):
    assert line in str(error.value)
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"opt_state: .*mu.*\(absent\)"):
    checkpoints.restore(abstract(params), abstract(optax.sgd(0.1).init(params)))


def _delete(workdir):
  array_files(workdir, 3)[0].unlink()


def _truncate(workdir):
  path = array_files(workdir, 3, "opt_state")[0]
  path.write_bytes(path.read_bytes()[:-5])


def _flip(workdir):
  path = array_files(workdir, 3)[0]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _lose_item(workdir):
  os.rename(workdir / "checkpoints/3/meta", workdir / "meta")


def _lose_list(workdir):
  (workdir / "checkpoints/3/files.json").write_text('{"params/')


@pytest.mark.parametrize("damage", [_delete, _truncate, _flip, _lose_item, _lose_list])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capfd, damage):
  save_steps(tmp_path, 1, 2, 3)
  damage(tmp_path)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step() == 2
  assert (tmp_path / "checkpoints/3").exists()
  assert re.search(
    r"warning: .*checkpoints/3 is damaged and passed over: .*(missing|bytes|chang|read)", capfd.readouterr().err
  )
  params, opt_state = make_state(2)
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(abstract(params), abstract(opt_state))
    assert restored.step == 2
    assert_same((restored.params, restored.opt_state), (params, opt_state))
    # The run goes on, and saves the step again that was damaged.
    checkpoints.save(3, *make_state(33), {})
    assert_same(checkpoints.restore_params(abstract(params)).params, make_state(33)[0])
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step() == 3
  assert len(list((tmp_path / "checkpoints/damaged").iterdir())) == 1


def test_all_damaged_is_an_error_and_never_a_fresh_start(tmp_path):
  save_steps(tmp_path, 1, 2)
  for step in (1, 2):
    array_files(tmp_path, step)[0].unlink()
  for _ in range(2):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"all .* damaged \(steps 1, 2\)"):
      checkpoints.latest_step()
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="damaged; take another step"):
    checkpoints.meta(2)


def test_missing_checkpoints(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
      checkpoints.meta()
  save_steps(tmp_path, 4)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(CheckpointError, match=r"no checkpoint of step 5 .* steps 4"),
  ):
    checkpoints.meta(5)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.meta(4.0)["step"] == 4


@pytest.mark.parametrize("other", [0, 99, "1", None])
def test_another_format_is_refused(tmp_path, monkeypatch, other):
  monkeypatch.setattr("megabyte_jax.checkpoints.checkpoints.FORMAT", other)
  save_steps(tmp_path, 4)
  monkeypatch.undo()
  message = rf"checkpoints/4 has format {other}, and this megabyte_jax reads 1 alone; take the version that wrote it"
  with Checkpoints(tmp_path) as checkpoints:
    for read in (checkpoints.meta, lambda: checkpoints.restore_params(abstract(make_state()[0]))):
      with pytest.raises(CheckpointError, match=message):
        read()


def test_saved_by_step_and_kept_by_count_and_period(tmp_path):
  config = CheckpointConfig(every_steps=2, keep=2, keep_every_steps=6)
  with Checkpoints(tmp_path, config) as checkpoints:
    for step in range(1, 16):
      assert checkpoints.should_save(step) == (step % 2 == 0)
      if checkpoints.should_save(step):
        checkpoints.save(step, *make_state(), {})
    checkpoints.save(15, *make_state(), {"saved": "once"})
    checkpoints.save(15, *make_state(), {"saved": "twice"})  # it is there already
    assert checkpoints.meta(15)["saved"] == "once"
  kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert kept == [6, 12, 14, 15]


def test_saved_by_the_clock(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  with Checkpoints(tmp_path, CheckpointConfig(every_steps=0, every_minutes=2.0)) as checkpoints:
    assert not checkpoints.should_save(1000)
    now[0] += 119
    assert not checkpoints.should_save(1001)
    now[0] += 1
    checkpoints.save(1002, *make_state(), {})
    assert not checkpoints.should_save(1003)
    assert not checkpoints.preempted(1003)


def test_with_several_processes_the_clock_is_that_of_the_first(tmp_path, monkeypatch):
  """It is asked at every sixteenth step alone, and its answer is everybody's."""
  clocks, asked = {"here": 100.0}, []
  monkeypatch.setattr(time, "monotonic", lambda: clocks["here"])
  with Checkpoints(tmp_path, CheckpointConfig(every_steps=0, every_minutes=2.0)) as checkpoints:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
      "megabyte_jax.checkpoints.checkpoints.from_first_process", lambda own: asked.append(own) or first
    )
    clocks["here"] += 119  # this process would wait a second more
    first = True
    assert [step for step in range(1, 49) if checkpoints.should_save(step)] == [16, 32, 48]
    clocks["here"] += 60
    first = False
    assert not any(checkpoints.should_save(step) for step in range(1, 49))
    assert asked == [False] * 3 + [True] * 3
    monkeypatch.undo()


def test_meta_that_is_not_json(tmp_path):
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="does not fit into JSON"):
    checkpoints.save(1, *make_state(), {"seconds": np.float32(1)})


KILLED = """
import sys, jax.numpy as jnp
from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.config import CheckpointConfig
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep=3))
step = checkpoints.latest_step() or 0
print("started at", step, flush=True)
while True:
  step += 1
  params = {str(i): jnp.full((300, 300), step + i / 16.0) for i in range(12)}
  checkpoints.save(step, params, {"count": jnp.int32(step)}, {"step": step})
  print("saving", step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_save(tmp_path, capfd):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
  wanted = {str(i): jax.ShapeDtypeStruct((300, 300), jnp.float32) for i in range(12)}
  reached = 0
  for wait in (0.0, 0.013, 0.031):
    process = subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == f"started at {reached}\n"
    for _ in range(3):
      process.stdout.readline()
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
      restored = checkpoints.restore_params(wanted)
    assert restored.meta["step"] == restored.step >= reached + 2  # the third save began after the second was on disk
    reached = restored.step
    for i in range(12):
      np.testing.assert_array_equal(restored.params[str(i)], np.full((300, 300), reached + i / 16.0, np.float32))
  assert "damaged" not in capfd.readouterr().err


def test_a_half_written_checkpoint_is_named_and_removed(tmp_path, capfd):
  save_steps(tmp_path, 1)
  half = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
  (half / "params").mkdir(parents=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    checkpoints.save(2, *make_state(), {})
  assert re.search(r"warning: .*/2\.orbax-checkpoint-tmp was left half-written", capfd.readouterr().err)
  assert not half.exists()
  assert json.loads((tmp_path / "checkpoints/2/files.json").read_text())


def test_a_renamed_checkpoint_is_refused(tmp_path):
  save_steps(tmp_path, 4, 5)
  (tmp_path / "checkpoints" / "5").rename(tmp_path / "checkpoints" / "1000")
  with Checkpoints(tmp_path) as checkpoints:
    for step in (None, 1000):
      with pytest.raises(CheckpointError, match=r"checkpoints/1000 holds step 5; give it this name back, or move it"):
        checkpoints.meta(step)
    assert checkpoints.meta(4)["step"] == 4
