"""Fetching Debian, npm and PyPI packages through their own clients, and unpacking parts of them."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence


def fetch(kind: str, name: str, folder: pathlib.Path) -> pathlib.Path:
  """The package file of `name` in `folder`, fetched if it is not there; apt, npm and pip verify what they fetch.

  Args:
    kind: debian | npm | pypi.
    name: of the package; NAME@VERSION for npm, NAME==VERSION for PyPI.

  Raises:
    SystemExit: the client is missing or fails; the message says what to do.
  """
  folder.mkdir(parents=True, exist_ok=True)
  patterns = {
    "debian": f"{name}_*.deb",
    "npm": name.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz",
    "pypi": name.replace("==", "-").replace("-", "[-_]", name.count("-")) + "*.whl",
  }
  commands = {
    "debian": ["apt-get", "download", "-qq", name],
    "npm": ["npm", "pack", "--silent", name],
    "pypi": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", name],
  }
  if not list(folder.glob(patterns[kind])):
    with Scratch(folder / f".{kind}.part") as scratch:
      _run(commands[kind], scratch, f"is {kind} reachable, and (Debian) was apt-get update run?")
      for path in scratch.iterdir():
        os.replace(path, folder / path.name)
  found = sorted(folder.glob(patterns[kind]))
  if not found:
    sys.exit(f"{' '.join(commands[kind])} brought no {patterns[kind]}")
  return found[-1]


class Scratch:
  """An empty folder that is gone afterwards."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __enter__(self) -> pathlib.Path:
    shutil.rmtree(self.path, ignore_errors=True)
    self.path.mkdir(parents=True)
    return self.path

  def __exit__(self, *_):
    shutil.rmtree(self.path, ignore_errors=True)


def _run(command: Sequence[str], folder: pathlib.Path, hint: str) -> None:
  try:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
  except FileNotFoundError:
    sys.exit(f"{command[0]} is not installed; {hint}")
  if result.returncode:
    sys.exit(f"{' '.join(command)} failed: {result.stderr.strip()[-300:]}; {hint}")


def files(package: pathlib.Path, patterns: Iterable[str]) -> Iterator[tuple[str, bytes]]:
  """(path, contents) of the regular files of a package whose paths match a pattern (`*` spans folders), as stored."""
  patterns = list(patterns)

  def wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.removeprefix("./"), pattern) for pattern in patterns)

  if package.suffix == ".whl":
    with zipfile.ZipFile(package) as wheel:
      for name in wheel.namelist():
        if wanted(name):
          yield name, wheel.read(name)
    return
  if package.suffix == ".deb":
    unpacker = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
      yield from _tar_files(archive, wanted)
    if unpacker.wait():
      sys.exit(f"{package} cannot be unpacked; delete it and run this again")
    return
  with tarfile.open(package, "r|*") as archive:
    yield from _tar_files(archive, wanted)


def _tar_files(archive: tarfile.TarFile, wanted) -> Iterator[tuple[str, bytes]]:
  for member in archive:
    if member.isfile() and wanted(member.name) and (file := archive.extractfile(member)):
      yield member.name.removeprefix("./"), file.read()


def sha256(path: pathlib.Path) -> str:
  """Of a file's contents."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
