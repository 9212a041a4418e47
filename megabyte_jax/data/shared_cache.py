"""Keeps the latest results of slow work, each worked out once, also when several threads ask for it together."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

DOCUMENT_BYTES = 1 << 30  # of decoded documents that a source keeps: short windows are drawn from all of them in turn


def array_bytes(array: np.ndarray) -> int:
  """Returns the bytes of an array: the `weigh` of a cache whose limit is memory."""
  return array.nbytes


class SharedCache(Generic[T]):
  """Keeps the latest results of `make(number)` in memory; functools.lru_cache would let each thread make its own.

  Args:
    make: the work; what it raises reaches all that wait for it, and is not kept.
    limit: how much stays. The latest result does, even if it weighs more.
    weigh: what a result counts; 1 unless given.
  """

  def __init__(self, make: Callable[[int], T], limit: int, weigh: Callable[[T], int] = lambda _: 1):
    self._make, self._limit, self._weigh = make, limit, weigh
    self._lock = threading.Lock()
    self._results: OrderedDict[int, Future[T]] = OrderedDict()
    self._weights: dict[int, int] = {}  # of the results that are ready
    self._total = 0

  def __call__(self, number: int) -> T:
    """Returns the result for `number`."""
    with self._lock:
      future = self._results.get(number)
      mine = future is None
      if future is None:
        future = self._results[number] = Future()
      self._results.move_to_end(number)
    if mine:
      try:
        result = self._make(number)
      except BaseException as error:
        with self._lock:
          del self._results[number]
        future.set_exception(error)
      else:
        with self._lock:
          self._weights[number] = self._weigh(result)
          self._total += self._weights[number]
          self._drop_oldest()
        future.set_result(result)
    return future.result()

  def _drop_oldest(self) -> None:
    """Until the rest is light enough; what is still being made stays."""
    while self._total > self._limit and len(self._weights) > 1:
      oldest = next(number for number in self._results if number in self._weights)
      self._total -= self._weights.pop(oldest)
      del self._results[oldest]
