"""What `import megabyte_jax` brings along, and what it offers."""

import ast
import graphlib
import json
import pathlib
import subprocess
import sys

import pytest
from run_commands import environment

import megabyte_jax
from megabyte_jax.__main__ import COMMANDS

CODE = """
import json, sys
import {module} as module
for name in getattr(module, "__all__", ()):
  getattr(module, name)
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
  "datasets",
  "pyarrow",
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


def test_importing_the_package_does_not_wait_for_jax():
  """Nor does a command that reads its arguments; in a process of its own, for here JAX is imported."""
  commands = ", ".join(f"megabyte_jax.commands.{name}" for name in COMMANDS)
  code = f"import sys, megabyte_jax.__main__, {commands}\nassert 'jax' not in sys.modules, sorted(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def with_training():
  """What a process finds after it has imported train.py, eval.py and other commands."""
  code = """
import importlib, json, signal, sys
def state():
  handlers = [signal.getsignal(number) for number in signal.valid_signals()]
  return handlers, sys.stdout, sys.stderr, sys.excepthook, sys.unraisablehook, sys.displayhook, sys.argv
import faulthandler, jax, orbax.checkpoint  # what others do is not ours
before = state()
import megabyte_jax, megabyte_jax.__main__, train, eval
from megabyte_jax.commands import matching, plan, tables
importlib.reload(train)
importlib.reload(eval)
found = {"as it was": state() == before}
from absl import flags
found["flags"] = [name for name in flags.FLAGS.flags_by_module_dict() if name.startswith(("megabyte_jax", "train"))]
print(json.dumps(found | {"modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""
  return json.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


def test_importing_leaves_the_process_as_it_was(with_training):
  """Signals, streams and hooks; also train.py and eval.py, and again after a reload, as in a notebook."""
  assert with_training["as it was"]


def test_nor_does_training_bring_tensorflow_or_torch(with_training):
  assert "train" in with_training["modules"]
  assert not {"tensorflow", "tensorflow_datasets", "torch"} & set(with_training["modules"])


def test_importing_a_command_defines_no_flags(with_training):
  """So that it can be used from programs that have flags of their own."""
  assert with_training["flags"] == []


def test_windows_is_refused_in_one_line():
  code = "import sys; sys.platform = 'win32'; import megabyte_jax"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.stderr.splitlines()[-1].startswith("ImportError: megabyte_jax runs on Linux and macOS")


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
  # `from megabyte_jax.models import flops` is an import of flops.
  return {name: (modules & set(paths)) - {"megabyte_jax"} for name, modules in found.items()}


ROOMS = (  # each imports only from those before it, and from itself
  "errors",
  "config",
  "files",
  "parallel",
  "display",
  "data",
  "models",
  "checkpoints",
  "training",
  "evaluation",
  "generation",
  "paper",
  "planning",
  "commands",
  "__main__",
)


def room_of(module):
  return module.split(".")[1]


def test_no_import_circle():
  graph = imports_of_each_module()
  assert "megabyte_jax.models.flops" in graph["megabyte_jax.planning.roofline"]
  list(graphlib.TopologicalSorter(graph).static_order())  # names the modules of a circle


def test_rooms_import_only_earlier_rooms():
  graph = imports_of_each_module()
  rooms = {room_of(name) for name in graph if name != "megabyte_jax"}
  assert rooms <= set(ROOMS), f"rooms without a place in the order: {sorted(rooms - set(ROOMS))}"
  later = [
    f"{name} imports {used}"
    for name, uses in graph.items()
    for used in sorted(uses)
    if name != "megabyte_jax" and ROOMS.index(room_of(used)) > ROOMS.index(room_of(name))
  ]
  assert not later, later


def test_models_know_neither_data_nor_files():
  used = set().union(*(used for name, used in imports_of_each_module().items() if room_of(name + ".") == "models"))
  assert {room_of(name) for name in used} == {"errors", "config", "parallel", "models"}


def test_the_top_of_the_package_holds_rooms_alone():
  root = pathlib.Path(megabyte_jax.__file__).parent
  files = {path.name for path in root.iterdir() if path.is_file()}
  assert files <= {"__init__.py", "__main__.py", "errors.py", "py.typed"}, files
  for room in [path for path in root.rglob("*") if path.is_dir() and any(path.glob("*.py"))]:
    modules = [path for path in room.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 16, f"{room} has {len(modules)} modules"
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert doc and "\n" not in doc, f"{room}/__init__.py says in one sentence what lives there"


def test_files_fit_in_the_head():
  root = pathlib.Path(megabyte_jax.__file__).parents[1]
  paths = [
    *root.glob("*.py"),
    *(p for room in ("megabyte_jax", "configs", "benchmarks") for p in (root / room).rglob("*.py")),
  ]
  long = {str(path): count for path in paths if (count := len(path.read_text().splitlines())) > 350}
  long = {path: count for path, count in long.items() if not path.endswith("comparisons.py")}
  assert not long, long


def test_nothing_but_kernels_for_gpus_needs_pallas_for_triton():
  """JAX calls that part deprecated: without it the package is imported, runs a model and generates."""
  code = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None  # an import of it fails
import jax, jax.numpy as jnp
from flax import nnx
from megabyte_jax import Level, MegabyteConfig, byte_nats, generate, make_model
from megabyte_jax.parallel.backend import triton
assert triton() is None
levels = [Level(patch_size=size, width=32, num_layers=1, num_heads=2) for size in (4, 1)]
model = make_model(MegabyteConfig(context=16, levels=tuple(levels), compute_dtype="bfloat16"), nnx.Rngs(0))
x_BT = jnp.zeros((1, 16), jnp.int32)
assert jax.jit(lambda x_BT: byte_nats(model, x_BT)[0])(x_BT).shape == (1, 16)
assert generate(model, b"ab", 8).bytes_.shape == (1, 8)
"""
  subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_public_names_exist_and_are_explained():
  for name in megabyte_jax.__all__:
    assert getattr(megabyte_jax, name).__doc__, name
