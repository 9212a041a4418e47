"""Eight virtual CPU devices for every test, asked for before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # cuda: tests/test_accelerator.py
_flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
_flags.append("--xla_force_host_platform_device_count=8")
if "cuda" in os.environ["JAX_PLATFORMS"]:  # of float32 products in full precision it would try out kernels for minutes
  _flags.append("--xla_gpu_enable_triton_gemm=false")
os.environ["XLA_FLAGS"] = " ".join(_flags)
# A cache of compiled programs would hide what a fresh machine does.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import pytest  # noqa: E402


@pytest.fixture
def quick_compile():
  """Compiles without most optimisations: a tiny model spends its time in the compiler, not in the run."""
  import jax  # noqa: PLC0415

  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
