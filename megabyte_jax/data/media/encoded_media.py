"""Says what an origin of encoded images or recordings offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class EncodedMedia(Protocol):
  """Encoded images or recordings: files, or records of a data set.

  Attributes:
    skipped: items that were left out because they are empty or cannot be read.
  """

  skipped: int

  @property
  def names(self) -> Sequence[str]:
    """One name per item."""
    ...

  @property
  def fingerprint(self) -> str:
    """See `Source.fingerprint`."""
    ...

  def load(self, i: int) -> bytes:
    """Returns item number i as it is encoded. Raises DataError that names its place."""
    ...

  def place(self, i: int) -> str:
    """Returns where item i is, for errors: its path, or its file and line or row."""
    ...
