"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a temporary path beside `path` to write to; it takes the name `path` when the block ends well.

  A reader sees the old file or the new one, never a part. The folder is made where it is missing; after an
  exception the temporary file is removed and `path` is as it was.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
  try:
    yield temporary
    temporary.replace(path)
  except OSError as error:
    if error.errno is not None and error.filename in (None, str(temporary)):  # that of a full disk names no file
      error.filename, error.filename2 = str(path), None
    raise
  finally:
    if temporary.exists():
      temporary.unlink()
