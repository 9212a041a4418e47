"""Makes short strings that differ where data do: what a run compares before it goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def combine_fingerprints(parts: Iterable[object]) -> str:
  """Makes one fingerprint of several, or of other strings, in their order."""
  return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def hash_values(values: Iterable[bytes]) -> str:
  """Returns a fingerprint of byte strings, in their order."""
  digest = hashlib.sha256()
  for value in values:
    digest.update(f"{len(value)}\0".encode())
    digest.update(value)
  return digest.hexdigest()[:16]
