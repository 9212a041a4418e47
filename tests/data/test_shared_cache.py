"""The latest results of slow work (data/shared_cache.py)."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megabyte_jax.data.shared_cache import SharedCache


def test_threads_that_ask_together_share_one_result():
  made = []

  def make(number):
    made.append(number)
    time.sleep(0.05)
    return [number]

  kept, barrier = SharedCache(make, 4), threading.Barrier(8)

  def ask(i):
    barrier.wait()
    return kept(i % 2)

  with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(ask, range(8)))
  assert sorted(made) == [0, 1]
  assert results == [[0], [1]] * 4
  assert len({id(result) for result in results}) == 2


def test_only_the_latest_stay():
  made = []
  kept = SharedCache(made.append, 2)
  for number in (1, 2, 1, 3, 1, 2):  # 3 drops 2, which was used longest ago
    kept(number)
  assert made == [1, 2, 3, 2]


def test_results_stay_while_they_are_light_enough():
  made = []

  def make(number):
    made.append(number)
    return "x" * number

  kept = SharedCache(make, 10, len)
  for number in (4, 5, 4, 6, 4, 5, 4, 12, 12, 4):  # 6 drops 5, 5 drops 6; 12 alone is too heavy, and yet stays
    assert kept(number) == "x" * number
  assert made == [4, 5, 6, 5, 12, 4]


def test_an_error_reaches_all_and_is_not_kept():
  attempts = []

  def make(number):
    attempts.append(number)
    if len(attempts) == 1:
      time.sleep(0.05)
      raise OSError("gone")
    return number

  kept, barrier = SharedCache(make, 4), threading.Barrier(2)

  def ask(_):
    barrier.wait()
    with pytest.raises(OSError, match="gone"):
      kept(7)

  with ThreadPoolExecutor(2) as pool:
    list(pool.map(ask, range(2)))
  assert kept(7) == 7 and len(attempts) == 2
