"""Makes short strings that differ where data do: what a run compares before it goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def pair_fingerprints(older: str, newer: str) -> str:
  """Makes a fingerprint with two parts: what runs of older versions stored, and what they did not look at.

  A saved one without a second part is still compared with the first; see `same_fingerprint`.
  """
  return f"{older}|{newer}"


def same_fingerprint(saved: object, now: object) -> bool:
  """Tells whether a saved fingerprint is that of the data as they are now."""
  if isinstance(saved, str) and isinstance(now, str) and "|" not in saved:
    now = now.partition("|")[0]
  return saved == now


def combine_fingerprints(parts: Iterable[object]) -> str:
  """Makes one fingerprint of several, or of other strings, in their order."""
  halves = [str(part).partition("|")[::2] for part in parts]
  older, newer = ("\0".join(half) for half in zip(*halves, strict=True))
  newer = _short_hash(newer) if newer.strip("\0") else ""
  return pair_fingerprints(_short_hash(older), newer) if newer else _short_hash(older)


def _short_hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_values(values: Iterable[bytes]) -> str:
  """Returns a fingerprint of byte strings, in their order."""
  digest = hashlib.sha256()
  for value in values:
    digest.update(f"{len(value)}\0".encode())
    digest.update(value)
  return digest.hexdigest()[:16]
