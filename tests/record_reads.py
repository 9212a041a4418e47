"""Runs train.py and writes down which rows of the batches this process read: `WORKDIR/rows-PROCESS.json`.

In the process whose number is in the variable FAILING the data end with an error after a few batches.
"""

import contextlib
import json
import os
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).parents[1]

if __name__ == "__main__":
  from megabyte_jax.data.batches import Windows

  drawn, read = [], Windows.read

  def read_and_note(self, draw, out_T):
    drawn.append(draw)
    if os.environ.get("FAILING") == os.environ["JAX_PROCESS_ID"] and len(drawn) > 100:
      raise OSError("the disk is gone")
    return read(self, draw, out_T)

  Windows.read = read_and_note
  [workdir] = [argument.partition("=")[2] for argument in sys.argv if argument.startswith("--workdir=")]
  sys.argv[0] = str(ROOT / "train.py")
  with contextlib.suppress(SystemExit):  # train.py ends so, too, when all is well
    runpy.run_path(sys.argv[0], run_name="__main__")
  pathlib.Path(workdir, f"rows-{os.environ['JAX_PROCESS_ID']}.json").write_text(json.dumps(sorted(drawn)))
