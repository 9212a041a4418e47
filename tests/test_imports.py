"""What `import megabyte_jax` brings along, and what it offers."""

import ast
import graphlib
import json
import pathlib
import subprocess
import sys

import megabyte_jax

CODE = """
import json, sys
import {module}
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
# tensorboardX and matplotlib are for training, soundfile, soxr and PIL for some data, constriction for compression; the
# rest is never needed.
HEAVY = {
  "tensorflow",
  "tensorflow_datasets",
  "torch",
  "matplotlib",
  "tensorboardX",
  "PIL",
  "soundfile",
  "soxr",
  "pandas",
  "constriction",
}


def imported(module):
  output = subprocess.run(
    [sys.executable, "-c", CODE.format(module=module)], capture_output=True, text=True, check=True
  )
  return set(json.loads(output.stdout))


def test_the_package_brings_nothing_heavy_along():
  modules = imported("megabyte_jax")
  assert "jax" in modules
  assert not modules & HEAVY


def test_nor_does_training_bring_tensorflow_or_torch():
  assert not imported("train") & {"tensorflow", "tensorflow_datasets", "torch"}


def test_importing_a_command_defines_no_flags():
  """So that it can be used from programs that have flags of their own."""
  code = "import megabyte_jax.tables, megabyte_jax.matching, megabyte_jax.plan\n"
  code += "from absl import flags\n"
  code += "own = [name for name in flags.FLAGS.flags_by_module_dict() if name.startswith('megabyte_jax')]\n"
  code += "assert not own, own"
  subprocess.run([sys.executable, "-c", code], check=True)


def module_name(path):
  return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports_of_each_module():
  """Module -> modules of the package that it imports, be it inside a function or for types alone."""
  root = pathlib.Path(megabyte_jax.__file__).parent
  paths = {module_name(path.relative_to(root.parent)): path for path in root.rglob("*.py")}
  found = {name: set() for name in paths}
  for name, path in paths.items():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found[name] |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] |= inner | {node.module}
  # `from megabyte_jax import flops` is an import of flops.
  return {name: (modules & set(paths)) - {"megabyte_jax"} for name, modules in found.items()}


def test_imports_have_an_order():
  graph = imports_of_each_module()
  assert "megabyte_jax.flops" in graph["megabyte_jax.plan"]
  list(graphlib.TopologicalSorter(graph).static_order())  # names the modules of a circle


def test_models_know_neither_data_nor_training():
  used = set().union(*(used for name, used in imports_of_each_module().items() if ".models" in name))
  outside = {name.removeprefix("megabyte_jax.") for name in used if ".models" not in name}
  assert outside == {"backend", "config_parsing", "parameter_names"}


def test_nothing_but_kernels_for_gpus_needs_pallas_for_triton():
  """JAX calls that part deprecated: without it the package is imported, runs a model and generates."""
  code = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None  # an import of it fails
import jax.numpy as jnp
from flax import nnx
from megabyte_jax import Level, MegabyteConfig, byte_nats, generate, make_model
from megabyte_jax.backend import triton
assert triton() is None
levels = [Level(patch_size=size, width=32, num_layers=1, num_heads=2) for size in (4, 1)]
model = make_model(MegabyteConfig(context=16, levels=tuple(levels), compute_dtype="bfloat16"), nnx.Rngs(0))
assert byte_nats(model, jnp.zeros((1, 16), jnp.int32))[0].shape == (1, 16)
assert generate(model, b"ab", 8).bytes_.shape == (1, 8)
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_explained():
  for name in megabyte_jax.__all__:
    assert getattr(megabyte_jax, name).__doc__, name
