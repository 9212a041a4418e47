"""Collects English books in the public domain from three public repositories.

The held-out novels are all of COST-ELTeC/ELTeC-eng, split by author. A book to train on is left out where it shares
more than a two-hundredth of its word 8-grams with them or with a text that the project scores elsewhere, or more than
half of them with a book that is there already (another edition, or a volume of collected works).
"""

from __future__ import annotations

import hashlib
import html
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from packages import files

CLASSICS = "mlschmitt/classic-books-markdown@944882722e9a96fa6cf2739dc2ea757e101f412f"
HUNDRED = "computationalstylistics/100_english_novels@143e601875d70e195f2cc5ebd8b034609271194d"
ELTEC = "COST-ELTeC/ELTeC-eng@3db3b6738a836f0e1b276b6c9703e42f4297f978"

_LAST_YEAR = 1930
_NGRAM = 8
_SHARED_WITH_TEST = 1 / 200
_SHARED_WITH_TRAINING = 1 / 2


def held_out(clone: pathlib.Path) -> Iterator[tuple[str, str, bytes]]:
  """Yields (split, file name, text) of the novels in ELTeC-eng; all of an author's are in one split."""
  for path, contents in files(clone, ["level1/*.xml"]):
    name = pathlib.Path(path).stem
    author = name.partition("_")[2]
    split = ("test", "validation")[hashlib.md5(author.encode()).digest()[0] % 2]
    yield split, f"{name}.txt", text_of_tei(contents.decode())


def text_of_tei(document: str) -> bytes:
  """Extracts the text of a TEI document, without header and notes: a line per paragraph, an empty one between."""
  body = document[document.index("<text") :]
  body = re.sub(r"<!--.*?-->|<note\b.*?</note>|<div type=\"notes\".*?</div>", " ", body, flags=re.DOTALL)
  paragraphs = re.split(r"</?(?:p|head|l|lg|div|quote|trailer|label|front|body|back)\b[^>]*>", body)
  lines = (" ".join(html.unescape(re.sub(r"<[^>]+>", "", part)).split()) for part in paragraphs)
  return ("\n\n".join(line for line in lines if line) + "\n").encode()


def to_train_on(classics: pathlib.Path, hundred: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Yields (file name, text) of the books of the two other repositories, none of a year after 1930 where given."""
  for path, contents in files(classics, ["*/*.md"]):
    text = contents.decode("utf-8", "replace").replace("\r\n", "\n").removeprefix("\ufeff")
    year = re.search(r"^## Year: *(-?\d+)", text, flags=re.MULTILINE)
    if year and int(year[1]) <= _LAST_YEAR:
      yield "classics/" + re.sub(r"[^\w.-]+", "_", path, flags=re.ASCII), text.encode()
  for path, contents in files(hundred, ["corpus/*.txt"]):
    text = contents.decode("utf-8", "replace").replace("\r\n", "\n").removeprefix("\ufeff")
    yield f"hundred/{pathlib.Path(path).name}", text.encode()


class Shared:
  """Remembers the word 8-grams seen before, ignoring case and punctuation; a sixteenth of them stands for all."""

  def __init__(self):
    self._seen = np.zeros(1 << 29, np.uint8)  # a bit for each of 2^32 hashes

  def add(self, text: bytes) -> None:
    """Remembers the 8-grams of a text."""
    hashes = _ngrams(text)
    np.bitwise_or.at(self._seen, hashes >> 3, (1 << (hashes & 7)).astype(np.uint8))

  def share(self, text: bytes) -> float:
    """Returns the share of a text's 8-grams that were seen before."""
    hashes = _ngrams(text)
    return float(np.mean((self._seen[hashes >> 3] >> (hashes & 7)) & 1)) if hashes.size else 0.0


def without_overlap(books: Iterator[tuple[str, bytes]], scored: Iterator[bytes]) -> Iterator[tuple[str, bytes]]:
  """Yields the books that share little with the scored texts and with each other, in the order of their names."""
  tested, trained = Shared(), Shared()
  for text in scored:
    tested.add(text)
  for name, text in sorted(books):
    if tested.share(text) <= _SHARED_WITH_TEST and trained.share(text) <= _SHARED_WITH_TRAINING:
      trained.add(text)
      yield name, text


def _ngrams(text: bytes) -> np.ndarray:
  """A 32-bit hash of a sixteenth of the runs of eight words, chosen by their hash."""
  words = re.findall(rb"[a-z0-9]+", text.lower())
  numbers: dict[bytes, int] = {}
  codes = np.fromiter(
    (numbers.get(w) or numbers.setdefault(w, int.from_bytes(hashlib.md5(w).digest()[:8], "little") | 1) for w in words),
    np.uint64,
    len(words),
  )
  if len(codes) < _NGRAM:
    return np.zeros(0, np.int64)
  total = np.zeros(len(codes) - _NGRAM + 1, np.uint64)
  for i in range(_NGRAM):
    total = total * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + len(total)]
  total ^= total >> np.uint64(29)
  chosen = total[(total * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(60) == 0]
  return (chosen & np.uint64(0xFFFFFFFF)).astype(np.int64)
