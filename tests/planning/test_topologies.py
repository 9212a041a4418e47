"""Names of TPU topologies. What asks libtpu needs it, pip install "jax[tpu]", and is skipped without it."""

import importlib.util
import os
import subprocess
import sys

import pytest

from megabyte_jax.commands import plan
from megabyte_jax.config import MeshConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.parallel import hardware
from megabyte_jax.parallel.sharding import make_mesh
from megabyte_jax.planning import topologies

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"'
)
TOPOLOGY = "v5e:2x2"


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r'pip install "jax\[tpu\]"'):
    topologies.topology_devices(TOPOLOGY)


@pytest.mark.parametrize("topology", ["v5e:32x32", "v5e:4x4x4", "v6e:2x2x2", "v5e:4x32"])
def test_sides_that_no_slice_has_are_refused_before_the_compiler_ends_the_process(topology, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  with pytest.raises(ConfigError, match=f"there is no topology {topology}: .* two sides of at most 16"):
    topologies.topology_devices(topology)


def test_the_topology_is_checked_before_the_batch(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  config = ["--config=tests/tiny_config.py", "--batch_size=3", "--config.accumulate=2"]
  with pytest.raises(ConfigError, match="there is no topology v5e:32x32"):
    plan.main([*config, "--topology=v5e:32x32"])


@needs_libtpu
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:3x7", "h100:8"])
def test_unknown_topology_is_one_clear_error(topology):
  with pytest.raises(ConfigError, match=r"libtpu has no topology.*; plan is for TPUs") as found:
    topologies.topology_devices(topology)
  assert "regex" not in str(found.value)


@needs_libtpu
def test_nothing_is_said_of_the_tpu_that_is_not_here():
  code = f"from megabyte_jax.planning import topologies; print(len(topologies.topology_devices({TOPOLOGY!r})))"
  here = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "TF_CPP"))}
  done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ("4\n", "")


@needs_libtpu
def test_devices_of_a_chip_can_be_laid_out():
  for topology, devices, per_chip in (("v4:2x2x2", 8, 1), ("v5p:2x2x2", 8, 1), ("tpu7x:2x2x2", 16, 2)):
    found = topologies.topology_devices(topology)
    assert (len(found), hardware.devices_per_chip(found[0])) == (devices, per_chip)
    assert make_mesh(MeshConfig(data=1, fsdp=-1, seq=2), found).size == devices


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("v5p-512", "its 256 chips are v5p:4x8x8"),
    ("v5litepod-256", "its 256 chips are v5e:16x16"),
    ("v6e-8", "its 8 chips are v6e:2x4"),
    ("tpu7x-128", "its 64 chips are tpu7x:4x4x4"),
    ("tpu7x:64", "its 64 chips are tpu7x:4x4x4"),
    ("v5p-8", "its 4 chips are v5p:2x2x1"),
    ("v5e-1", ""),
    ("v5e-512", ""),
    ("v4-48", "write its 24 chips as sides, such as v4:4x4x4"),
    ("v7x-256", "its 128 chips are tpu7x:4x4x8"),
    ("v7x:4x4x4", "write tpu7x:4x4x4"),
    ("v5litepod:4x4", "write v5e:4x4"),
    ("v5p:4x4x4", ""),
    ("h100:8", ""),
    ("h100", ""),
  ],
)
def test_cloud_names_are_translated_to_chips(name, told):
  assert topologies.in_chips(name) == told
