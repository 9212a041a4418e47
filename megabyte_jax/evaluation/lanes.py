"""Puts the windows of documents into batches: one after the other, or each document in a row of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megabyte_jax.evaluation.windows import Window

Row = tuple[int, Window]  # document number, window


def one_after_the_other(documents: Iterable[Iterable[Row]], size: int) -> Iterator[list[Row | None]]:
  """Yields batches of at most `size` windows, whatever documents they are of."""
  batch: list[Row | None] = []
  for document in documents:
    for row in document:
      batch.append(row)
      if len(batch) == size:
        yield batch
        batch = []
  if batch:
    yield batch


def side_by_side(documents: Iterable[Iterable[Row]], size: int) -> Iterator[list[Row | None]]:
  """Yields batches of `size` rows, each of which goes through a document, window by window, and then takes the next.

  So a recurrent model's memory of a row is that of its document. Rows for which no document is left are None.
  """
  waiting = iter(documents)
  lanes: list[Iterator[Row]] = [iter(())] * size
  while True:
    batch: list[Row | None] = []
    for i in range(size):
      row = next(lanes[i], None)
      while row is None and (document := next(waiting, None)) is not None:
        lanes[i] = iter(document)
        row = next(lanes[i], None)
      batch.append(row)
    if not any(batch):
      return
    yield batch
