"""Eight virtual CPU devices for every test, and programs compiled with little effort, asked for before JAX starts."""

import mmap
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # cuda: tests/test_accelerator.py
_flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
os.environ["XLA_FLAGS"] = " ".join([*_flags, "--xla_force_host_platform_device_count=8"])
# A cache of compiled programs would hide what a fresh machine does.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Each of the tests' processes has a core; threads of NumPy's that wait for another core spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import jaxlib  # noqa: E402
import pytest  # noqa: E402

EMITTERS = "xla_cpu_use_fusion_emitters"  # without them a program compiles in half the time


def _xla_knows(flag):
  """XLA has no list of its flags, and ends the process at one that it does not know."""
  library = pathlib.Path(jaxlib.__file__).with_name("libjax_common.so")
  if not library.exists():
    return False
  with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return content.find(flag.encode()) >= 0


# A tiny model spends its time in the compiler, not in the run. What starts train.py and the like as a person does
# compiles as it does for a person (`commands.environment`), and so do the tests with `full_compile`.
_quick = os.environ["JAX_PLATFORMS"] == "cpu"
jax.config.update("jax_disable_most_optimizations", _quick)
if _quick and EMITTERS not in os.environ["XLA_FLAGS"] and _xla_knows(EMITTERS):
  os.environ["XLA_FLAGS"] += f" --{EMITTERS}=false"


@pytest.fixture
def full_compile():
  """Compiles with every optimisation; holds the options that `Lowered.compile` needs for that beside."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield {EMITTERS: True} if EMITTERS in os.environ["XLA_FLAGS"] else {}
  jax.config.update("jax_disable_most_optimizations", before)


# The files that take longest, longest first, so that no process is left alone with one of them at the end.
LONG = ("multiprocess", "resume", "decoding", "compress", "train", "generation", "models", "sharding", "patch_groups")


def pytest_collection_modifyitems(items):
  place = {f"test_{name}": i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
