"""Takes names of sources apart: several in one text, and the field of records that one names."""

from __future__ import annotations

import os
import re

from megabyte_jax.errors import require


def split_list(spec: str) -> list[str]:
  r"""Returns the names in a comma-separated list; `\,` is a comma within a name.

  Spaces around names are dropped. A text that is itself the name of a file or folder is that one name.

  Raises:
    ConfigError: a name is empty.
  """
  if os.path.lexists(spec):
    return [spec]
  names = [name.replace("\\,", ",") for name in re.split(r"(?<!\\),", spec)]
  names = [name if os.path.lexists(name) else name.strip() for name in names]
  require(all(names), f"data source {spec!r} has an empty entry; separate names by single commas")
  return names


def split_field(spec: str) -> tuple[str, str]:
  """Returns (path or glob, field) of `PATH#FIELD`; the field is empty where none is named, or the path has the #."""
  path, mark, field = spec.rpartition("#")
  if not mark or not path or not field or "/" in field or os.path.lexists(spec):
    return spec, ""
  return path, field
