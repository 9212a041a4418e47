import gc
import os
import re
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from megabyte_jax.config import DataConfig
from megabyte_jax.data import file_handles
from megabyte_jax.data.file_handles import Budget, Handles
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import DataError


class Opened:
  """Counts how many of its kind are open."""

  count = 0

  def __init__(self, number):
    self.number = number
    Opened.count += 1

  def __del__(self):
    Opened.count -= 1


def make_folders(path, folders, files):
  for i in range(folders):
    (path / str(i)).mkdir()
    for j in range(files):
      (path / str(i) / f"{j}.txt").write_bytes(f"{i},{j}".encode() * 40)
  return ",".join(str(path / str(i)) for i in range(folders))


def open_descriptors():
  return len(os.listdir("/proc/self/fd" if os.path.exists("/proc/self/fd") else "/dev/fd"))


def test_all_sources_share_one_budget_and_the_oldest_are_closed():
  budget = Budget(4)
  one, other = Handles(Opened, budget), Handles(Opened, budget)
  for i in range(10):
    assert one(i).number == i and other(i).number == i
  assert Opened.count == 4
  again = one(9)
  assert one(9) is again and one(8).number == 8
  for i in range(10):
    other(i)
  assert again.number == 9 and Opened.count == 5  # what is being read stays open
  del one, again
  gc.collect()
  assert Opened.count == 4
  del other
  gc.collect()
  assert Opened.count == 0


def test_the_budget_follows_what_the_process_may_open(monkeypatch):
  limits = {256: 64, 1024: 256, 65536: 256, resource.RLIM_INFINITY: 256, 2: 1}
  for allowed, expected in limits.items():
    monkeypatch.setattr(resource, "getrlimit", lambda _, allowed=allowed: (allowed, allowed))
    assert Budget().limit == expected


def test_too_many_open_files_closes_those_held_and_tries_again():
  budget, failures = Budget(8), [OSError(24, "Too many open files"), OSError(23, "Too many open files in system")]
  held = Handles(Opened, budget)
  for i in range(8):
    held(i)

  def action():
    if Opened.count:
      raise failures.pop()
    return "done"

  assert budget.with_room(action) == "done" and Opened.count == 0 and len(failures) == 1

  def fails():
    raise OSError(24, "Too many open files")

  with pytest.raises(DataError, match=r"as many files open as it may .*ulimit -n"):
    budget.with_room(fails)
  with pytest.raises(FileNotFoundError):
    budget.with_room(lambda: os.stat("/nothing/here"))


def test_folders_of_many_files_are_read_with_few_open(tmp_path, monkeypatch):
  monkeypatch.setattr(file_handles.BUDGET, "_limit", 10)
  source = open_path(make_folders(tmp_path, 2, 30), DataConfig())
  before = open_descriptors()
  expected = [f"{i},{j}".encode() * 40 for i in range(2) for j in sorted(range(30), key=str)]
  problems = []

  def read_all():
    order = np.random.default_rng(threading.get_ident() % 1000).permutation(60).tolist() * 3
    for i in order:
      if source.read(i, 0, int(source.lengths[i])).tobytes() != expected[i]:
        problems.append(i)

  threads = [threading.Thread(target=read_all) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not problems and open_descriptors() <= before + 10


TRAIN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import numpy as np
from megabyte_jax.config import DataConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import open_path
source = open_path(sys.argv[1], DataConfig())
seen = 0
for _, batch in batches(source, batch_size=64, context=64, seed=0, num_steps=200):
  seen += len(batch.x_BT)
  if seen == 64 * 100:
    held = []  # nearly all that are left are taken by somebody else
    try:
      while True:
        held.append(open("/dev/null"))
    except OSError:
      del held[-4:]
print(seen)
try:
  while True:
    held.append(open("/dev/null"))
except OSError:
  pass
try:
  for i in range(len(source.names)):
    source.read(i, 0, 10)
except Exception as error:
  print(type(error).__name__, error)
"""


def test_five_folders_of_300_files_train_with_256_open_files(tmp_path):
  spec = make_folders(tmp_path, 5, 300)
  done = subprocess.run([sys.executable, "-c", TRAIN, spec], capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr
  seen, *problem = done.stdout.splitlines()
  assert seen == str(64 * 200)
  for line in problem:  # where nothing is left, no file is blamed
    assert re.match(r"DataError this process has as many files open as it may \(256\)", line)
