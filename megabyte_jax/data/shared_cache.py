"""The last few results of slow work, each worked out once, also when several threads ask for it together."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedCache(Generic[T]):
  """`make(number)`, of which the latest results stay in memory; functools.lru_cache would let each thread make its own.

  Args:
    make: the work; what it raises reaches all that wait for it, and is not kept.
    size: how many results stay.
  """

  def __init__(self, make: Callable[[int], T], size: int):
    self._make, self._size = make, size
    self._lock = threading.Lock()
    self._results: OrderedDict[int, Future[T]] = OrderedDict()

  def __call__(self, number: int) -> T:
    """The result for `number`."""
    with self._lock:
      future = self._results.get(number)
      mine = future is None
      if future is None:
        future = self._results[number] = Future()
      self._results.move_to_end(number)
      if len(self._results) > self._size:
        self._results.popitem(last=False)
    if mine:
      try:
        future.set_result(self._make(number))
      except BaseException as error:
        with self._lock:
          if self._results.get(number) is future:
            del self._results[number]
        future.set_exception(error)
    return future.result()
