"""Serves paths of object stores, such as gs://bucket/folder: the packages they need, many requests at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
_REQUESTS = 32  # at once; each waits some tens of milliseconds for its answer
_SCHEMES = ("gs://", "s3://", "az://", "hf://")  # those of etils.epath
# What the packages that are missing call themselves in their ImportErrors, and what installs them.
_INSTALL = {
  "gcsfs": '-e ".[gcs]"',
  "google-cloud-storage": '-e ".[gcs]"',
  "s3fs": "s3fs",
  "adlfs": "adlfs",
  "huggingface_hub": "huggingface_hub",
}


def is_remote(path: object) -> bool:
  """Returns True if a path names an object store."""
  return "://" in str(path)


def unknown_scheme(spec: str) -> str:
  """Returns the first scheme in a text that cannot be read, such as https://; '' if all can."""
  return next((scheme for scheme in re.findall(r"\w+://", spec) if scheme not in _SCHEMES), "")


def missing_package(error: ImportError) -> str:
  """Returns a line with the command that installs what a remote path needs, or '' where the error has another cause."""
  for package, install in _INSTALL.items():
    if package in str(error):
      return f"paths in a bucket need {package}, which is not installed: pip install {install}"
  return ""


def in_parallel(function: Callable[[_T], _R], items: Iterable[_T], remote: bool) -> list[_R]:
  """Returns function(item) for each, in order; calls many at once where they are remote. The first error is raised."""
  if not remote:
    return [function(item) for item in items]
  with ThreadPoolExecutor(_REQUESTS) as pool:
    return list(pool.map(function, items))
