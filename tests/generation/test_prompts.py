import os
import threading

from megabyte_jax.commands.generate import parse_arguments
from megabyte_jax.config import DataConfig
from megabyte_jax.generation.media_files import read_prompt


def test_a_prompt_may_come_through_a_pipe(tmp_path):
  """As from `--prompt-file=<(command)`."""
  os.mkfifo(tmp_path / "pipe")
  writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"from a pipe",))
  writer.start()
  arguments = parse_arguments(["--workdir=run", f"--prompt-file={tmp_path}/pipe"])
  assert read_prompt(arguments.prompt_file, DataConfig(), keep=0.5).kept.tobytes() == b"from "
  writer.join(timeout=10)
