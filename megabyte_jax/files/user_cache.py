"""Says where a user's caches lie; everything in them may be deleted at any time."""

from __future__ import annotations

import os


def user_cache_folder() -> str:
  """Returns megabyte_jax in $XDG_CACHE_HOME, or ~/.cache/megabyte_jax; where there is no home, it begins with ~."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.path.join(base, "megabyte_jax")
