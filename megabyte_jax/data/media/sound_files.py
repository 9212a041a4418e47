"""Finds out whether recordings are whole: libsndfile takes what is left of one that was cut short without a word."""

from __future__ import annotations

import os
import re
from typing import IO, Literal, NamedTuple

# Sizes that stand for one that is elsewhere, or was not known when the head was written: in pipes, by ffmpeg and sox.
_UNKNOWN = (0xFFFFFFFF, 0x7FFFF000)
_FIRST, _LAST = 2, 4  # flags of an OGG page
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"3DI")  # begin what some programs append

_MP3_COUNT = re.compile(rb"(?:Xing|Info)\0\0\0[\x01-\x0f]")  # after a frame's head of 4 bytes and its side information

JOINED = "holds several recordings, one after another, of which only the first would be read"


class _Layout(NamedTuple):
  """Says how a kind of file consists of chunks: a name of four bytes and a size, then so many bytes."""

  head: int  # bytes before the first chunk
  order: Literal["big", "little"]
  width: int  # bytes of a size
  samples: bytes  # name of the chunk that holds them
  even: bool  # whether chunks begin at even places


def _layout(head: bytes) -> _Layout | None:
  if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
    return _Layout(12, "big" if head[:4] == b"RIFX" else "little", 4, b"data", True)
  if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
    return _Layout(12, "big", 4, b"SSND", True)
  return _Layout(8, "big", 8, b"data", False) if head[:4] == b"caff" else None


def chunk_problem(file: IO[bytes]) -> str:
  """Finds what is wrong with the size of the samples in a WAV, AIFF, CAF or AU file.

  The size in the very head is not looked at: many programs write one that is a few bytes off, and what comes after the
  samples is not read. A size that stands for an unknown one means all bytes up to the end.

  Returns:
    What is wrong; empty if nothing is, or it is not such a file.
  """
  total = file.seek(0, os.SEEK_END)
  file.seek(0)
  head = file.read(12)
  if head[:4] == b".snd":
    start, size = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
    if start < 24:  # bytes of the head
      return f"says that its samples begin at byte {start}, within its head"
    return _samples_problem(file, head, start, total, size) if size not in _UNKNOWN else ""
  layout = _layout(head)
  if not layout:
    return ""
  promised, long_size, place = int.from_bytes(head[4:8], layout.order), None, file.seek(layout.head)
  unknown = (*_UNKNOWN, (1 << 64) - 1)
  while len(chunk := file.read(4 + layout.width)) == 4 + layout.width:
    size, place = int.from_bytes(chunk[4:], layout.order), place + len(chunk)
    if chunk[:4] == b"ds64":  # of RF64: the sizes in 64 bits, that of the samples second
      long_size = int.from_bytes(file.read(16)[8:], "little")
    elif chunk[:4] == layout.samples:
      size = long_size if size in _UNKNOWN and long_size is not None else size
      rest = total - place
      if size == 0 and rest > 0 and promised in (0, *_UNKNOWN):
        return "does not say how long it is: what wrote it was stopped"
      if size in unknown:
        return "" if rest else "has no samples"
      return _samples_problem(file, head, place, total, size)
    place = file.seek(min(place + size + (size % 2 if layout.even else 0), total))
  return "has no samples" if total > 12 else ""


def _samples_problem(file: IO[bytes], head: bytes, start: int, total: int, size: int) -> str:
  """Finds what is wrong with samples that fill `size` of a file's `total` bytes, from `start` on."""
  if total - start < size:
    return f"is cut short: {max(total - start, 0):,} bytes of samples of {size:,}"
  file.seek(start + size)
  after = file.read(5)
  return JOINED if head[:4] in (after[:4], after[1:]) else ""  # there may be a byte that makes the size even


def is_joined_mp3(data: bytes) -> bool:
  """Tells whether an MP3 file has two frames that count the frames of a recording: a decoder believes the first."""
  counts, place = 0, -1
  while counts < 2 and (found := _MP3_COUNT.search(data, place + 1)):
    place = found.start()
    heads = (data[place - 4 - side : place - 2 - side] for side in (32, 17, 9) if place >= 4 + side)
    counts += any(head[0] == 0xFF and head[1] & 0xE6 == 0xE2 for head in heads)
  return counts == 2


def ogg_problem(data: bytes) -> str:
  """Finds what is wrong with the pages of an OGG file; returns an empty text if nothing is.

  Pages must follow each other without a gap, be counted without one, and each stream must end with a page that says so.
  After that a tag may follow.
  """
  place, ended = 0, set[bytes]()
  next_page: dict[bytes, int] = {}
  while place < len(data):
    head = data[place : place + 27]
    sizes = data[place + 27 : place + 27 + head[26]] if len(head) == 27 else b""
    stop = place + 27 + len(sizes) + sum(sizes)
    if next_page and ended == next_page.keys() and head.startswith(_TAGS):
      return ""
    if head[:4] != b"OggS" or len(sizes) < head[26] or stop > len(data):
      return f"is damaged or cut short at byte {place:,}"
    if head[5] & _FIRST and ended:
      return JOINED
    flags, stream, number = head[5], head[14:18], int.from_bytes(head[18:22], "little")
    if number != next_page.get(stream, 0 if flags & _FIRST else -1) or stream in ended:
      return f"lacks a page before byte {place:,}"
    next_page[stream] = number + 1
    if flags & _LAST:
      ended.add(stream)
    place = stop
  return "" if next_page and ended == next_page.keys() else "is cut short: its last page is missing"
