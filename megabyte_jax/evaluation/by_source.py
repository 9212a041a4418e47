"""Splits an evaluation of several sources, such as --data=books,code, into what each of them costs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megabyte_jax.data.sources import Joined, Source
from megabyte_jax.evaluation.evaluate import Evaluation
from megabyte_jax.models.loss import bits_per_byte


class SourceBits(NamedTuple):
  """Holds what was measured on one of several sources; the name is the user's, and bytes are those scored."""

  name: str
  bpb: float
  bytes: int
  documents: int


def by_source(source: Source, result: Evaluation) -> list[SourceBits]:
  """Returns the bits per byte of each source that was named; none where there is only one name.

  Sources of which no byte was scored, as --max-bytes leaves them, are left out.
  """
  if not isinstance(source, Joined) or not source.specs:
    return []
  ends = np.cumsum([len(part.lengths) for part in source.sources])
  found = []
  for name, start, end in zip(source.specs, [0, *ends], ends, strict=False):
    count = int(result.document_bytes[start:end].sum())
    if count:
      bits = float(bits_per_byte(float(result.document_nats[start:end].sum()), count))
      found.append(SourceBits(name, bits, count, int(np.count_nonzero(result.document_bytes[start:end]))))
  return found
