"""Cuts a text of any bytes into segments that are tokenized by themselves, so that a long text needs little memory.

A segment is a run of line breaks and the line after it. Pieces never cross from one segment into the next, in the
training of a tokenizer either. Where a text is cut depends on its bytes alone, not on how it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

LONGEST = 4096  # bytes of a segment; longer lines are cut before a space where they have one
_SEGMENT = re.compile(rb"[\r\n]*[^\r\n]*")
_APART = re.compile("[\u2581\udc80-\udcff]+")  # SentencePiece's own mark of a space, and bytes that are not UTF-8


def segments(blocks: Iterable[bytes]) -> Iterator[bytes]:
  """Yields the segments of a text, none of them empty; joined they are the text.

  Args:
    blocks: the text in parts of any size.
  """
  left = b""
  for block in blocks:
    left += block
    place = 0
    while (end := _end_of(left, place)) < len(left):
      yield left[place:end]
      place = end
    left = left[place:]
  place = 0
  while place < len(left):
    end = _end_of(left, place)
    yield left[place:end]
    place = end


def _end_of(text: bytes, place: int) -> int:
  """Where the segment ends that begins at `place`; at the end of the text it may go on in the next block."""
  found = _SEGMENT.match(text, place, place + LONGEST + 1)
  end = found.end() if found else place  # it matches everywhere
  if end - place <= LONGEST:
    return end
  end = place + LONGEST
  if (space := text.rfind(b" ", place + 1, end)) > 0:
    return space
  for back in range(4):  # not within a character of UTF-8
    if text[end - back] & 0xC0 != 0x80:
      return end - back
  return end


def runs(segment: bytes) -> Iterator[tuple[str, bool]]:
  """Yields (text, whether SentencePiece is to cut it) of the parts of a segment; the other parts are single bytes.

  Bytes that are not UTF-8 are surrogate escapes in the text, as Python has them.
  """
  text, done = segment.decode("utf-8", "surrogateescape"), 0
  for found in _APART.finditer(text):
    if found.start() > done:
      yield text[done : found.start()], True
    yield found[0], False
    done = found.end()
  if done < len(text):
    yield text[done:], True


def as_bytes(text: str) -> bytes:
  """Returns the bytes that `runs` made a text of."""
  return text.encode("utf-8", "surrogateescape")
