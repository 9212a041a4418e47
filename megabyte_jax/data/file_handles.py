"""Keeps files open between reads, for all sources of the process within one budget."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from megabyte_jax.errors import DataError

T = TypeVar("T")

_SHARE, _MOST = 4, 256  # a quarter of what the process may open, for JAX, checkpoints and the rest need some, too
_NONE_LEFT = (errno.EMFILE, errno.ENFILE)


class Budget:
  """Keeps the latest used of what was opened, and lets the rest go.

  What is let go closes with its last reference, so that a thread which is reading it goes on.

  Args:
    limit: how many stay; None takes a quarter of RLIMIT_NOFILE at each opening, at most 256.
  """

  def __init__(self, limit: int | None = None):
    self._limit, self._lock = limit, threading.RLock()  # taken again where collecting garbage drops an owner
    self._held: OrderedDict[Hashable, Any] = OrderedDict()
    self._owners = itertools.count()

  @property
  def limit(self) -> int:
    """Files that may stay open."""
    if self._limit is not None:
      return self._limit
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if allowed == resource.RLIM_INFINITY else max(1, min(_MOST, allowed // _SHARE))

  def new_owner(self) -> int:
    """Returns a number that no other owner has."""
    return next(self._owners)

  def get(self, key: Hashable, make: Callable[[], T]) -> T:
    """Returns what is held under `key`; makes it where it is not there, and lets the oldest go."""
    with self._lock:
      if key in self._held:
        self._held.move_to_end(key)
        return self._held[key]
    made = self.with_room(make)
    with self._lock:
      made = self._held.setdefault(key, made)
      self._held.move_to_end(key)
      while len(self._held) > self.limit:
        self._held.popitem(last=False)
    return made

  def with_room(self, action: Callable[[], T]) -> T:
    """Returns action(); where too many files are open, lets go all that are held and does it again.

    Raises:
      DataError: too many are open even so.
      OSError: any other that the action raises.
    """
    try:
      return action()
    except OSError as error:
      if error.errno not in _NONE_LEFT:
        raise
    with self._lock:
      self._held.clear()
    try:
      return action()
    except OSError as error:
      if error.errno not in _NONE_LEFT:
        raise
      allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
      raise DataError(
        f"this process has as many files open as it may ({allowed:,}); allow more, with `ulimit -n 4096` for one"
      ) from error

  def drop(self, owner: int) -> None:
    """Lets go all that an owner holds."""
    with self._lock:
      for key in [key for key in self._held if isinstance(key, tuple) and key[0] == owner]:
        del self._held[key]


BUDGET = Budget()  # of the process


class Handles(Generic[T]):
  """The open files of one source, by number.

  Args:
    make: opens number i. It must hold no reference to what owns these handles, or they stay open with it.
    budget: of which they are a part.
  """

  def __init__(self, make: Callable[[int], T], budget: Budget = BUDGET):
    self._make, self._budget, self._owner = make, budget, budget.new_owner()
    weakref.finalize(self, budget.drop, self._owner)

  def __call__(self, i: int) -> T:
    """Returns number i, open. Raises DataError where too many files are open."""
    return self._budget.get((self._owner, i), lambda: self._make(i))


def require_descriptor() -> None:
  """Raises OSError where this process cannot open one more file: for readers that do not say why they failed."""
  os.close(os.open(os.devnull, os.O_RDONLY))
