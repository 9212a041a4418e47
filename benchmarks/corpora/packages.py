"""Fetches Debian, npm and PyPI packages and git commits through their own clients, and unpacks parts of them."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence

_REACHABLE = "is {} reachable, and (Debian) was apt-get update run?"


def fetch(kind: str, name: str, folder: pathlib.Path, recorded: Iterable[str] = ()) -> pathlib.Path:
  """Returns the package file of `name` in `folder`, fetched if need be; apt, npm and pip verify what they fetch.

  Args:
    kind: debian | npm | pypi.
    name: of the package; NAME@VERSION for npm, NAME==VERSION for PyPI.
    folder: where package files are kept.
    recorded: file names of known packages; of a Debian package that version is asked for before the newest.

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
      if kind != "debian" or not _fetch_recorded(name, recorded, scratch):
        _run(commands[kind], scratch, _REACHABLE.format(kind))
      for path in scratch.iterdir():
        os.replace(path, folder / path.name)
  found = sorted(folder.glob(patterns[kind]))
  if not found:
    sys.exit(f"{' '.join(commands[kind])} brought no {patterns[kind]}")
  return found[-1]


def _fetch_recorded(name: str, recorded: Iterable[str], folder: pathlib.Path) -> bool:
  """Fetches a Debian package in its recorded version and returns True, or False where the archive has it no more."""
  for file in sorted(recorded, reverse=True):
    if file.startswith(f"{name}_"):
      version = urllib.parse.unquote(file.split("_")[1])  # a colon is %3a in file names
      try:
        _run(["apt-get", "download", "-qq", f"{name}={version}"], folder, _REACHABLE.format("debian"))
        return True
      except SystemExit as error:
        if "was not found" not in str(error):  # as apt says of a version; all else is an error
          raise
  return False


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
    environment = {**os.environ, "LC_ALL": "C"}  # messages in English
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
  except FileNotFoundError:
    sys.exit(f"{command[0]} is not installed; {hint}")
  if result.returncode:
    sys.exit(f"{' '.join(command)} failed: {result.stderr.strip()[-300:]}; {hint}")


def clone(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns a git repository in `folder` that has the commit of OWNER/NAME@COMMIT, fetched from GitHub if need be.

  A clone of one's own may lie there, too, as `folder`/OWNER+NAME@COMMIT.

  Raises:
    SystemExit: git is missing or fails; the message says what to do.
  """
  repository, _, commit = name.partition("@")
  path = folder / name.replace("/", "+")
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with Scratch(folder / ".git.part") as scratch:
      hint = f"is GitHub reachable? A clone of it can also be put at {path}"
      _run(["git", "init", "-q", "--bare", "."], scratch, hint)
      _run(["git", "fetch", "-q", "--depth=1", f"https://github.com/{repository}", commit], scratch, hint)
      os.replace(scratch, path)
  _run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], path, f"{path} is no repository with that commit; delete it")
  return path


_MOST_BYTES = 4 * 2**20  # of a file out of a repository


def files(package: pathlib.Path, patterns: Iterable[str]) -> Iterator[tuple[str, bytes]]:
  """Yields (path, contents) of a package's regular files whose paths match a pattern (`*` spans folders), as stored.

  Of a repository (`clone`) only those below 4 MiB.
  """
  patterns = list(patterns)

  def wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.removeprefix("./"), pattern) for pattern in patterns)

  if package.is_dir():
    yield from _git_files(package, package.name.rpartition("@")[2], wanted)
    return
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


def files_within(package: pathlib.Path, archive: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
  """Yields (path, contents) of the wanted files in the one archive of a package that matches a pattern.

  Paths are those below the archive's only folder.
  """
  [(_, packed)] = files(package, [archive])
  with tarfile.open(fileobj=io.BytesIO(packed), mode="r|*") as tree:
    for path, contents in _tar_files(tree, lambda path: is_wanted(path.partition("/")[2])):
      yield path.partition("/")[2], contents


def _git_files(repository: pathlib.Path, commit: str, wanted) -> Iterator[tuple[str, bytes]]:
  listing = subprocess.run(
    ["git", "ls-tree", "-r", "-l", "-z", commit], cwd=repository, capture_output=True, check=True
  ).stdout
  for entry in filter(None, listing.decode().split("\0")):
    (_, kind, blob, size), path = entry.partition("\t")[0].split(), entry.partition("\t")[2]
    if kind == "blob" and wanted(path) and size.isdigit() and int(size) < _MOST_BYTES:
      yield (
        path,
        subprocess.run(["git", "cat-file", kind, blob], cwd=repository, capture_output=True, check=True).stdout,
      )


def _tar_files(archive: tarfile.TarFile, wanted) -> Iterator[tuple[str, bytes]]:
  for member in archive:
    if member.isfile() and wanted(member.name) and (file := archive.extractfile(member)):
      yield member.name.removeprefix("./"), file.read()


def sha256(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file's contents, in hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
