"""Reads what FLAC files say of themselves: their checksum, and their length where the head leaves that open.

Layout and checksums: RFC 9639, sections 8.2 and 9.1.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

WIDTHS = {"PCM_16": 2, "PCM_24": 3}  # bytes a sample of those files whose checksum is verified
_TRIES = 8  # heads of frames that are looked at: by chance one in millions of places looks like one
_BLOCK_SIZES = {1: 192, **{c: 576 << (c - 2) for c in range(2, 6)}, **{c: 256 << (c - 8) for c in range(8, 16)}}


def has_checksum(data: bytes, samples: np.ndarray, width: int) -> bool:
  """Tells whether decoded samples [n, channels] have the MD5 that STREAMINFO promises (all zeros promise nothing)."""
  start = data.find(b"fLaC") + 4
  promised = data[start + 4 + 18 : start + 4 + 34]
  if not any(promised):
    return True
  raw = np.ascontiguousarray(samples, samples.dtype.newbyteorder("<")).view(np.uint8)
  raw = raw.reshape(-1, samples.itemsize)[:, samples.itemsize - width :]  # int32 holds 24 bits in its upper bytes
  return hashlib.md5(raw.tobytes()).digest() == promised


def is_joined(data: bytes) -> bool:
  """Tells whether another FLAC file follows within a file, whose samples a decoder does not reach."""
  at = data.find(b"fLaC") + 4
  while at + 4 <= len(data):  # blocks before the frames may hold anything
    last, at = data[at] & 0x80, at + 4 + int.from_bytes(data[at + 1 : at + 4], "big")
    if last:
      break
  return any(data.find(b"fLaC" + kind + b"\0\0\x22", at) >= 0 for kind in (b"\0", b"\x80"))


def says_no_length(head: bytes) -> bool:
  """Tells whether a file begins as FLAC does and has 0 samples in its head, which stand for an unknown number."""
  return head[:4] == b"fLaC" and len(head) >= 26 and not head[21] & 15 and not any(head[22:26])


def with_length(data: bytes) -> bytes:
  """Returns the file with the number of its samples put into its head; its last frame tells that number.

  Raises:
    ValueError: the end of the file is not a whole frame.
  """
  samples = _samples_before_the_end(data)
  length = (samples | (data[21] >> 4) << 36).to_bytes(5, "big")
  return data[:21] + length + data[26:]


def _samples_before_the_end(data: bytes) -> int:
  """Finds the last frame: a head with its checksum, from which on all bytes have the checksum at the end."""
  channels, largest_block = (data[20] >> 1 & 7) + 1, int.from_bytes(data[10:12], "big")
  first = max(42, len(data) - largest_block * channels * 4 - 64)  # no frame is larger than its samples
  place, tries = len(data), 0
  while tries < _TRIES and (place := data.rfind(b"\xff", first, place)) >= 0:
    if data[place + 1 : place + 2] in (b"\xf8", b"\xf9") and (samples := _frame_end(data, place)):
      tries += 1
      if _crc16(data[place:-2]) == int.from_bytes(data[-2:], "big"):
        return samples
  raise ValueError("its head does not say how long it is, and its last frame is damaged or cut short")


def _frame_end(data: bytes, place: int) -> int:
  """Samples up to the end of the frame whose head is at a place; 0 where there is none."""
  head = data[place : place + 16]
  first = head[4] if len(head) > 4 else 0xFF
  width = 1 if first < 0x80 else 8 - (first ^ 0xFF).bit_length()  # bytes of the number, coded like UTF-8
  if width > 7 or (width == 1 and first >= 0x80):
    return 0
  number = first if width == 1 else first & 0x7F >> width
  for byte in head[5 : 4 + width]:
    number = number << 6 | byte & 0x3F
  at, code = 4 + width, head[2] >> 4
  size = _BLOCK_SIZES.get(code, 0)
  if code in (6, 7):
    size = int.from_bytes(head[at : at + code - 5], "big") + 1
    at += code - 5
  at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)  # a rate that is none of the usual ones
  if not size or at >= len(head) or _crc8(head[:at]) != head[at]:
    return 0
  usual = int.from_bytes(data[8:10], "big")  # of all frames but the last, where they are numbered and not the samples
  return (number if head[1] & 1 else number * usual) + size


def _crc8(data: bytes) -> int:
  return _crc(data, 8, 0x07)


def _crc16(data: bytes) -> int:
  return _crc(data, 16, 0x8005)


def _crc(data: bytes, bits: int, polynomial: int) -> int:
  table, value, mask = _table(bits, polynomial), 0, (1 << bits) - 1
  for byte in data:
    value = (value << 8 & mask) ^ table[value >> (bits - 8) ^ byte]
  return value


@functools.cache
def _table(bits: int, polynomial: int) -> list[int]:
  table, top = [], 1 << (bits - 1)
  for value in (byte << (bits - 8) for byte in range(256)):
    for _ in range(8):
      value = (value << 1) ^ (polynomial if value & top else 0)
    table.append(value & ((1 << bits) - 1))
  return table
