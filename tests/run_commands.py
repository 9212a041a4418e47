"""Running train.py and eval.py as a person does, and inside the test's own process."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.saved_config import load_config
from megabyte_jax.config import MeshConfig
from megabyte_jax.data.open_data import SAMPLE_FOLDER
from megabyte_jax.display import plots
from megabyte_jax.parallel.sharding import make_mesh
from megabyte_jax.training.state import abstract_state

ROOT = pathlib.Path(__file__).parents[1]
MESH = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def write_data(folder):
  """20 kB to train on and 1,000 bytes to validate with, in two documents."""
  novel = pathlib.Path(SAMPLE_FOLDER, "text", "train", "moby_dick.txt").read_bytes()
  (folder / "train.txt").write_bytes(novel[30_000:50_000])
  (folder / "validation").mkdir()
  (folder / "validation" / "a.txt").write_bytes(novel[60_000:60_700])
  (folder / "validation" / "b.txt").write_bytes(novel[70_000:70_300])
  return folder


# How programs are compiled here, but not for how many devices: a command has one, as most people have.
XLA_FLAGS = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)


def environment(fresh=False):
  """Variables of a command that a person starts; `fresh`: without the programs that other tests have compiled."""
  variables = os.environ | {"XLA_FLAGS": XLA_FLAGS}
  variables["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(jax.config.values["jax_disable_most_optimizations"])  # as here
  return variables | ({"JAX_ENABLE_COMPILATION_CACHE": "false"} if fresh else {})


def start(*arguments, fresh=False, **options):
  """The running command `python ARGUMENTS`; its output waits for a reader after a few lines."""
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    env=environment(fresh),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    pipesize=4096,
    **options,
  )


# Imports the package once, then runs each command in a process of its own that begins there.
_DRIVER = """
import json, os, runpy, sys
from megabyte_jax.checkpoints import checkpoints
from megabyte_jax.commands import command_line
from megabyte_jax.display import metrics
from megabyte_jax.evaluation import evaluate, report
from megabyte_jax.data import batches, files
import matplotlib.backends.backend_agg, matplotlib.figure
sys.path.insert(0, os.getcwd())
for name, (arguments, variables) in json.load(sys.stdin).items():
  child = os.fork()
  if child == 0:
    output = os.open(os.path.join(sys.argv[1], name), os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    module = arguments[0] == "-m"
    sys.argv = arguments[module:]
    try:
      if module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
      else:
        runpy.run_path(arguments[0], run_name="__main__")
      code = 0
    except SystemExit as exit:
      code = exit.code or 0
    except BaseException:
      import traceback
      traceback.print_exc()
      code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_each(commands, outputs):
  """Runs `python ARGUMENTS` for each {name: arguments} or {name: (arguments, environment variables)}, in order.

  Returns {name: (exit code, what was printed)}; `outputs` is a new folder.
  """
  outputs.mkdir()
  given = {name: c if isinstance(c, tuple) else (c, {}) for name, c in commands.items()}
  driver = subprocess.run(
    [sys.executable, "-c", _DRIVER, str(outputs)],
    input=json.dumps(given),
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    check=True,
  )
  codes = {name: int(code) for name, code in (line.rsplit(" ", 1) for line in driver.stdout.splitlines())}
  return {name: (codes[name], (outputs / name).read_text(errors="replace")) for name in commands}


def finish(process):
  """What the command still prints, and its exit code."""
  output, _ = process.communicate(timeout=300)
  return output, process.returncode


def evaluate_command(monkeypatch, *arguments):
  """What eval.py prints when it is called in this process, as (lines, the last one's JSON).

  Without its pictures, which take longer than all the rest; test_eval_command.py starts one command that draws them.
  """
  import eval as command  # noqa: PLC0415  (its name would hide the built-in)

  monkeypatch.setattr(plots, "loss_by_position", lambda *_, **__: None)
  monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
  with contextlib.redirect_stdout(io.StringIO()) as output:
    command.main()
  lines = output.getvalue().splitlines()
  return lines, json.loads(lines[-1])


def metric_lines(workdir):
  """metrics.jsonl without what a clock or the machine decides."""
  timed = {"bytes_per_second", "tokens_per_second", "flops_per_second", "mfu", "seconds", "memory_bytes"}
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def saved_state(workdir):
  """(step, parameters, optimizer state) of the newest checkpoint, as NumPy arrays."""
  abstract = abstract_state(load_config(workdir), MESH)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    restored = checkpoints.restore(abstract.parameters, abstract.opt_state)
  return restored.step, *jax.tree.map(np.asarray, (restored.params, restored.opt_state))


def assert_bitwise_equal(tree, other):
  leaves, others = jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other)
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for (path, a), b in zip(leaves, others, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path), strict=True)
