"""Whether WAV and OGG files are whole: libsndfile takes what is left of one that was cut short without a word."""

from __future__ import annotations

import os
from typing import IO, Literal

_UNKNOWN = 0xFFFFFFFF  # the size of a chunk whose size is elsewhere, or that was not known when its head was written
_FIRST, _LAST = 2, 4  # flags of an OGG page


def wav_problem(file: IO[bytes]) -> str:
  """What is wrong with the sizes in a WAV file (RIFF, RIFX or RF64); empty if nothing is, or it is no such file."""
  total = file.seek(0, os.SEEK_END)
  file.seek(0)
  head = file.read(12)
  if head[:4] not in (b"RIFF", b"RIFX", b"RF64") or head[8:] != b"WAVE":
    return ""
  order: Literal["big", "little"] = "big" if head[:4] == b"RIFX" else "little"
  promised, long_size = int.from_bytes(head[4:8], order) + 8, None
  if head[:4] != b"RF64" and promised - 8 not in (0, _UNKNOWN) and total < promised:
    return f"is cut short: {total:,} bytes of {promised:,}"
  place = 12
  while len(chunk := file.read(8)) == 8:
    size = int.from_bytes(chunk[4:], order)
    if chunk[:4] == b"ds64":  # of RF64: the sizes in 64 bits, that of the samples second
      long_size = int.from_bytes(file.read(16)[8:], "little")
    elif chunk[:4] == b"data":
      size = long_size if size == _UNKNOWN and long_size is not None else size
      rest = total - place - 8
      if size == _UNKNOWN or (size == 0 and rest > 0 and promised - 8 in (0, _UNKNOWN)):
        return "does not say how long it is: what wrote it was stopped; write it anew"
      return f"is cut short: {rest:,} bytes of samples of {size:,}" if rest < size else ""
    place = file.seek(place + 8 + size + size % 2)
  return "has no samples" if total > 12 else ""


def ogg_problem(data: bytes) -> str:
  """What is wrong with the pages of an OGG file; empty if nothing is.

  Pages must follow each other without a gap, be counted without one, and each stream must end with a page that says so.
  """
  place, ended = 0, set()
  next_page: dict[bytes, int] = {}
  while place < len(data):
    head = data[place : place + 27]
    sizes = data[place + 27 : place + 27 + head[26]] if len(head) == 27 else b""
    stop = place + 27 + len(sizes) + sum(sizes)
    if head[:4] != b"OggS" or len(sizes) < head[26] or stop > len(data):
      return f"is damaged or cut short at byte {place:,}"
    flags, stream, number = head[5], head[14:18], int.from_bytes(head[18:22], "little")
    if number != next_page.get(stream, 0 if flags & _FIRST else -1) or stream in ended:
      return f"lacks a page before byte {place:,}"
    next_page[stream] = number + 1
    if flags & _LAST:
      ended.add(stream)
    place = stop
  return "" if next_page and ended == next_page.keys() else "is cut short: its last page is missing"
