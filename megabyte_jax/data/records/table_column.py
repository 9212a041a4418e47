"""Decides which rows of a table's column are records, for all stores of tables (Parquet, Hugging Face)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megabyte_jax.data.records.store import Chosen, Numbered
from megabyte_jax.data.sources import SKIP_HINT
from megabyte_jax.errors import DataError


class TableColumn:
  """The part of a `RecordStore` that all tables share: names, sizes and places of the rows that are records.

  All rows are records until `_choose_rows` leaves those out that hold no text.

  Attributes:
    skipped: rows (and files, if the subclass counts them) left out.
  """

  skipped = 0
  _shown: str  # the files or the data set, for errors
  _field: str
  _rows: Numbered
  _kept: np.ndarray | None = None  # rows that are records, where not all are
  _sizes = np.zeros(0, np.int64)

  def _choose_rows(self, sizes: np.ndarray, skip_bad: bool) -> None:
    """Keeps the rows with a text.

    Args:
      sizes: int64, bytes of each row's text; -1 for a row without a value.
      skip_bad: leave the latter out, too.

    Raises:
      DataError: no row is left; or a row has no value, and `skip_bad` is False.
    """
    without = np.flatnonzero(sizes < 0)
    if len(without) and not skip_bad:
      raise self._no_value(int(without[0]), len(without))
    kept = sizes > 0
    if not kept.any():
      raise DataError(f"none of {len(kept):,} rows of {self._shown} has a text in its field {self._field!r}")
    if not kept.all():
      self._kept = np.flatnonzero(kept)
      self.skipped += int(len(sizes) - len(self._kept))
      sizes = sizes[kept]
    self._sizes = sizes

  @property
  def names(self) -> Sequence[str]:
    """NAME[ROW] for each record."""
    return self._rows if self._kept is None else Chosen(self._rows, self._kept)

  @property
  def sizes(self) -> np.ndarray:
    """Bytes of each record, as in `RecordStore`; of texts alone."""
    return self._sizes

  def place(self, i: int) -> str:
    """Returns the place of record i; see `RecordStore`."""
    return self._place_of_row(self._row(i))

  def _row(self, i: int) -> int:
    return i if self._kept is None else int(self._kept[i])

  def _place_of_row(self, row: int) -> str:
    return self._rows[row]

  def _no_value(self, row: int, count: int = 1) -> DataError:
    what = f"has no value in {self._field!r}" + (f", the first of {count:,} such rows" if count > 1 else "")
    return DataError(f"{self._place_of_row(row)} {what}; skip such rows with {SKIP_HINT}")
