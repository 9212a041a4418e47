"""Runs a command: one line instead of a traceback for what a user can put right, and Ctrl-C without one."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from megabyte_jax.commands import stopping, strict_settings
from megabyte_jax.commands.arguments import in_notebook
from megabyte_jax.errors import UserError, in_one_line
from megabyte_jax.files import object_stores, outputs
from megabyte_jax.parallel import distributed

USER_ERRORS = (UserError, FloatingPointError, OSError)
_T = TypeVar("_T")


def read(parse_arguments: Callable[[], _T]) -> _T:
  """Returns what parse_arguments() does, for a script that imports JAX afterwards: --help and mistakes come at once.

  Errors end the process as in `run`; until then Ctrl-C ends it without a traceback.
  """
  if in_notebook():
    return parse_arguments()
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  _prepare_streams()
  strict_settings.switch_off()
  return _errors_in_one_line(parse_arguments)


def run(main: Callable[[], object], outlive_readers: bool = False) -> None:
  """Calls main(); an error that the user can put right becomes one line on stderr and exit code 1.

  With JAX_TRACEBACK_FILTERING=off the traceback comes before that line. In a notebook all errors are raised, and
  streams are afterwards as they were.

  Args:
    main: the command, its arguments read or not.
    outlive_readers: goes on where nobody reads the output any more (`distributed.outlive_readers`); others end.
  """
  if in_notebook():
    streams = sys.stdout, sys.stderr
    try:
      main()
    finally:
      sys.stdout, sys.stderr = streams
    return
  stopping.install_signal_handlers()
  _prepare_streams()
  strict_settings.switch_off()
  if outlive_readers:
    distributed.outlive_readers()
  _errors_in_one_line(main)


def _errors_in_one_line(main: Callable[[], _T]) -> _T:
  """Returns main(), or ends the process as `run` says."""
  try:
    return main()
  except BrokenPipeError:  # the reader of our output, head for instance, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
  except USER_ERRORS as error:
    _traceback_if_wanted()
    notes = (note for note in getattr(error, "__notes__", ()) if "removed its internal frames" not in note)
    said = str(error) if isinstance(error, UserError) else in_one_line(outputs.in_words(error))
    print("\n".join([f"error: {said}", *map(in_one_line, notes)]), file=sys.stderr)
    distributed.end(1)
  except ImportError as error:
    if not (line := object_stores.missing_package(error)):
      raise
    print(f"error: {in_one_line(line)}", file=sys.stderr)
    distributed.end(1)
  except (RuntimeError, AssertionError, MemoryError) as error:  # some of them are JAX's for devices that fail
    if not (line := _about_devices(error)):
      raise
    _traceback_if_wanted()
    print(f"error: {line}", file=sys.stderr)
    distributed.end(1)
  except KeyboardInterrupt:
    stopping.end()


def _prepare_streams() -> None:
  """Makes standard streams that were closed (`>&-`) lead nowhere, so that no file of ours takes their place.

  The others show names of files that are not UTF-8, too.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
      file = os.open(os.devnull, os.O_RDWR)
      if file != number:
        os.dup2(file, number)
        os.close(file)
      setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (until the process ends)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      with contextlib.suppress(OSError):  # of a descriptor that is no longer open
        stream.reconfigure(errors="backslashreplace")
  if not logging.root.handlers:
    logging.root.addHandler(_Warnings())


class _Warnings(logging.Handler):
  """Prints ours as commands print warnings, in one line each, whatever the names in them hold.

  Those of other packages look as `logging.basicConfig` makes them, so that nobody takes them for ours.
  """

  def __init__(self) -> None:
    super().__init__()
    self.setFormatter(logging.Formatter(logging.BASIC_FORMAT))

  def emit(self, record: logging.LogRecord) -> None:
    ours = record.name == "root" and not record.exc_info
    text = in_one_line(f"{record.levelname.lower()}: {record.getMessage()}") if ours else self.format(record)
    print(text, file=sys.stderr, flush=True)


def _setting(name: str) -> Any:
  """A setting of JAX; what the environment says where JAX is not imported yet."""
  jax: Any = sys.modules.get("jax")
  config = getattr(jax, "config", None)
  return config.values[name] if config is not None else os.environ.get(name.upper())


def _traceback_if_wanted() -> None:
  if _setting("jax_traceback_filtering") == "off":
    traceback.print_exc()


def _about_devices(error: Exception) -> str:
  """One line for the user about an error of the devices: no memory, or none of the kind wanted; else nothing."""
  text = " ".join(str(error).split())
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    return (
      f"too little memory ({text.removeprefix('RESOURCE_EXHAUSTED: ')[:120]}); to train, raise --config.accumulate, "
      "take --config.model.remat=full, a smaller --config.batch_size or --config.eval.batch_size, or spread the "
      "parameters over more devices (--config.mesh.data=1 --config.mesh.seq=1 --config.mesh.fsdp=-1); to evaluate, "
      "compress or generate, a smaller --batch-size or fewer --num-samples"
    )
  wanted = _setting("jax_platforms")
  if wanted and traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
    return (
      f"JAX finds no device of JAX_PLATFORMS={wanted}{text and f' ({text[:200]})'}; install the JAX that has them "
      f'(pip install -U "jax[cuda13]" or "jax[tpu]"), or leave JAX_PLATFORMS unset'
    )
  return ""
