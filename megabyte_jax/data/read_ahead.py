"""Reads parts of documents in a given order, a few ahead, by threads where reading takes work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from megabyte_jax.data.sources import Source

THREADS = min(16, os.cpu_count() or 1)  # where reading takes work


def read_ahead(source: Source, spans: Iterable[tuple[int, int, int]], num_threads: int = 0) -> Iterator[np.ndarray]:
  """Yields source.read(document, start, stop) for each of `spans`, in their order.

  Args:
    spans: (document, start, stop), taken as they are needed; may be endless.
    num_threads: 0 takes one per core, at most 16, or none where reading is cheap. Up to four reads per thread are
      ahead of the reader, so that many results are in memory.

  Raises:
    DataError: when the part that cannot be read is reached.
  """
  if not source.slow and not num_threads:
    yield from (source.read(*span) for span in spans)
    return
  threads = num_threads or THREADS
  waiting: deque[Future] = deque()
  with ThreadPoolExecutor(threads) as pool:
    try:
      for span in spans:
        waiting.append(pool.submit(source.read, *span))
        if len(waiting) >= 4 * threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()
