"""How long work has taken that reports nothing itself."""

import re
import threading
import time

from megabyte_jax.display.progress import elapsed


def test_elapsed_time_is_said_until_the_work_is_over(capsys):
  threads = threading.active_count()
  with elapsed("compiling", every=0.05):
    deadline = time.monotonic() + 20
    said = ""
    while said.count("\n") < 2 and time.monotonic() < deadline:
      time.sleep(0.02)
      said += capsys.readouterr().err
  assert all(re.fullmatch(r"compiling: \d\.\ds so far", line) for line in said.splitlines()) and said.count("\n") >= 2
  assert threading.active_count() == threads
