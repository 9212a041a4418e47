"""Keeps compiled programs on disk, so that a command's second start does not compile them again.

JAX's persistent compilation cache does it. Here it gets a folder of the user's own, which is kept small and belongs to
one kind of machine: XLA compiles for the processor's instructions and number of cores, and JAX's keys name neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
import warnings

import jax

from megabyte_jax.files.user_cache import user_cache_folder

MOST_BYTES = 2 << 30  # of a folder, when a command starts; then the programs longest not used are deleted
_FREE_BYTES = 1 << 30  # that a disk keeps: a program is not worth the space that a checkpoint needs
_QUICK_SECONDS = 0.1  # programs that compile in less are not kept


def keep_compiled_programs() -> str:
  """Has JAX keep compiled programs in the user's cache folder, and says so in one line on stderr.

  Nothing changes where the user has set JAX_COMPILATION_CACHE_DIR, or switched the cache off by
  JAX_ENABLE_COMPILATION_CACHE=false; nor in one of several processes, each of which would have to find the same
  programs. A folder that cannot be used leaves the run without a cache.

  Returns:
    The folder, or '' where nothing changed.
  """
  set_to = jax.config.values
  if set_to["jax_compilation_cache_dir"] or not set_to["jax_enable_compilation_cache"] or jax.process_count() > 1:
    return ""
  folder = pathlib.Path(user_cache_folder()) / "compiled" / machine()
  try:
    _prepare(folder)
  except OSError as error:
    print(f"compiled programs are not kept: {folder}: {error.strerror or error}", file=sys.stderr)
    return ""
  # JAX warns of every program that it cannot read or write, in several lines; a run does not need them.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _QUICK_SECONDS)
  if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:  # what timing chose goes with the program, not apart
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  switch = "JAX_ENABLE_COMPILATION_CACHE=false switches this off"
  print(f"compiled programs are kept in {folder} ({switch})", file=sys.stderr)
  return str(folder)


def machine() -> str:
  """Returns a short name of what programs are compiled for, beside the accelerator: the processor and its cores."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  known = [platform.machine(), platform.processor(), cores]
  with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # of Linux
    known += sorted(set(re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*", file.read(), re.MULTILINE)))
  return hashlib.sha256(repr(known).encode()).hexdigest()[:12]


def _prepare(folder: pathlib.Path) -> None:
  """Makes the folder where it is missing, for this user alone, and deletes what was not used for long.

  Raises:
    OSError: programs cannot be kept there, or others could put theirs in their place, which this process would run.
  """
  if not folder.is_absolute():
    raise OSError("there is no home folder")
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  status = folder.stat()
  if status.st_uid != os.getuid() or status.st_mode & 0o022:
    raise OSError("others own it or may write to it")
  with tempfile.TemporaryFile(dir=folder) as file:
    file.write(b"1")
  if shutil.disk_usage(folder).free < _FREE_BYTES:
    raise OSError("its disk is almost full")
  delete_oldest(folder, MOST_BYTES)


def delete_oldest(folder: pathlib.Path, most_bytes: int) -> None:
  """Deletes the programs longest not used until all take at most `most_bytes`, and empty ones, of a full disk.

  JAX's own limit (jax_compilation_cache_max_size) takes a lock for every program, and gives up all writing where a
  killed process left one half written. A process that misses a program here compiles it.
  """
  found = []
  for path in folder.iterdir():
    with contextlib.suppress(OSError):  # another process deletes, too
      status = path.stat()
      found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
  total = sum(size for _, size, _ in found)
  for _, size, path in sorted(found):
    if total > most_bytes or not size:
      total -= size
      with contextlib.suppress(OSError):
        path.unlink()
