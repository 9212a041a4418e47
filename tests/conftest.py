"""Eight virtual CPU devices for every test, and programs compiled with little effort, asked for before JAX starts."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile

# A tiny model spends its time in the compiler, not in the run; without these a program compiles in half the time.
# .ci/run starts the README's commands as a person does.
EMITTERS = "xla_cpu_use_fusion_emitters"  # a choice until jaxlib 0.11.0, unknown since

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # cuda: tests/models/test_accelerator.py
_flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
_flags.append("--xla_force_host_platform_device_count=8")
_quick = os.environ["JAX_PLATFORMS"] == "cpu"
_jaxlib = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:3]))
_has_emitters_flag = _quick and _jaxlib <= (0, 11, 0)
if _has_emitters_flag and not any(EMITTERS in flag for flag in _flags):
  _flags.append(f"--{EMITTERS}=false")
ONE_PIECE = "--xla_cpu_parallel_codegen_split_count=1"  # threads that share a program's compilation would take turns
if _quick and ONE_PIECE not in _flags:  # xdist's workers have it from the process that starts them
  _flags.append(ONE_PIECE)
if "cuda" in os.environ["JAX_PLATFORMS"]:  # of float32 products in full precision it would try out kernels for minutes
  _flags.append("--xla_gpu_enable_triton_gemm=false")
os.environ["XLA_FLAGS"] = " ".join(_flags)
# Programs are compiled once for all processes of this run of the tests, those that tests start among them. The cache
# begins empty, as on a fresh machine, and is gone with the run; what resumes exactly is also tested without it.
COMPILED = "MEGABYTE_TESTS_COMPILED"
if COMPILED not in os.environ:  # xdist's workers have it from the process that starts them
  os.environ[COMPILED] = tempfile.mkdtemp(prefix="megabyte-compiled-")
  atexit.register(shutil.rmtree, os.environ[COMPILED], ignore_errors=True)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ[COMPILED]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Each of the tests' processes has a core; threads of NumPy's that wait for another core spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

gc.freeze()  # the modules stay; tracing makes many objects, and each look for garbage would go through them all
gc.set_threshold(100_000, 20, 50)

jax.config.update("jax_disable_most_optimizations", _quick)


@pytest.fixture
def full_compile():
  """Compiles with every optimisation; holds the options that `Lowered.compile` needs for that beside."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield {EMITTERS: True} if _has_emitters_flag else {}
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="session")
def saved_whole():
  """Orbax lets each device that holds a copy of an array save a slice of it, and compiles a program for each slice.

  The tests' arrays are too small for that; what test_multiprocess.py starts saves as Orbax does by itself.
  """
  from orbax.checkpoint import type_handlers  # noqa: PLC0415  (the process that shares out the tests needs none)

  type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = 2**20


@pytest.fixture
def hangups():
  """Has SIGHUP do what it does by default: under nohup it is ignored, and a run leaves it so."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


# The files that take longest, longest first, so that no process is left alone with one of them at the end.
LONG = (
  "multiprocess",
  "resume",
  "decoding",
  "compression",
  "crafted_files",
  "documented_commands",
  "decoding_kernels",
  "train",
  "sampling",
  "models",
  "sharding",
  "patch_groups",
)


def pytest_collection_modifyitems(items):
  place = {f"test_{name}": i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
