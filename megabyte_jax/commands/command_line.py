"""What the commands share: one line instead of a traceback for what a user can put right; flags read by absl."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from megabyte_jax.config.parsing import did_you_mean, wrong_type
from megabyte_jax.errors import CheckpointError, ConfigError, DataError, PlotError
from megabyte_jax.files import object_stores, outputs
from megabyte_jax.parallel import distributed

USER_ERRORS = (ConfigError, CheckpointError, DataError, FloatingPointError, OSError, PlotError)
# How what absl and Python say of a value begins: what the flag takes.
_REFUSALS = {
  "invalid literal for int()": int,
  "could not convert string to float": float,
  "('Non-boolean argument": bool,
}


def run(main: Callable[[], object]) -> None:
  """Calls main(); an error that the user can put right becomes one line on stderr and exit code 1.

  With JAX_TRACEBACK_FILTERING=off the traceback comes before that line.
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
  sys.unraisablehook = _interrupt_again
  if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    main()
  except BrokenPipeError:  # the reader of our output, head for instance, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except USER_ERRORS as error:
    _traceback_if_wanted()
    notes = (note for note in getattr(error, "__notes__", ()) if "removed its internal frames" not in note)
    print("\n".join([f"error: {outputs.in_words(error)}", *notes]), file=sys.stderr)
    distributed.end(1)
  except ImportError as error:
    if not (line := object_stores.missing_package(error)):
      raise
    print(f"error: {line}", file=sys.stderr)
    distributed.end(1)
  except (RuntimeError, AssertionError, MemoryError) as error:  # some of them are JAX's for devices that fail
    if not (line := _about_devices(error)):
      raise
    _traceback_if_wanted()
    print(f"error: {line}", file=sys.stderr)
    distributed.end(1)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    distributed.end(130, at_once=True)


def _traceback_if_wanted() -> None:
  if jax.config.values["jax_traceback_filtering"] == "off":
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
  wanted = jax.config.values["jax_platforms"]
  if wanted and traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
    return (
      f"JAX finds no device of JAX_PLATFORMS={wanted}{text and f' ({text[:200]})'}; install the JAX that has them "
      f'(pip install -U "jax[cuda13]" or "jax[tpu]"), or leave JAX_PLATFORMS unset'
    )
  return ""


def _interrupt_again(unraisable: Any) -> None:
  """A Ctrl-C that fell into a callback of the garbage collector, JAX's for instance, where Python forgets it."""
  if unraisable.exc_type is not KeyboardInterrupt:
    return sys.__unraisablehook__(unraisable)
  threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()


def define_config(default: str, help_string: str) -> flags.FlagHolder:
  """The flag --config, whose file and overrides absl may read right here."""
  with _wrong_flags(sys.argv):
    return config_flags.DEFINE_config_file("config", default, help_string)


def parse_config_flags(arguments: Sequence[str]) -> list[str]:
  """absl's flag parsing, where a wrong flag or `--config.key` is one line that names it."""
  with _wrong_flags(arguments):
    rest = flags.FLAGS([re.sub(r"^--[\w-]+", _with_underscores, argument) for argument in arguments])
    for name in flags.FLAGS:
      config: Any = flags.FLAGS[name]
      if not ((config.present or name == "config") and hasattr(config, "config_filename")):
        continue
      if not hasattr(config.value, "items"):  # raises where there is no file
        raise flags.Error(f"get_config() of {config.config_filename} must return Config(...).to_config_dict()")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # libraries tell a lot at INFO
    return rest


def _with_underscores(flag: re.Match[str]) -> str:
  """--batch-size as --batch_size, as argparse's commands take both, too."""
  return "--" + flag[0][2:].replace("-", "_")


def run_with_flags(main: Callable[[list[str]], object]) -> None:
  """`run` for a command with absl's flags; main() gets the command's name and what is no flag."""
  run(lambda: app.run(main, flags_parser=parse_config_flags))


@contextlib.contextmanager
def _wrong_flags(arguments: Sequence[str]) -> Iterator[None]:
  try:
    yield
  except BrokenPipeError:  # the reader of --help has seen enough
    raise
  except SystemExit as error:
    if traceback.extract_tb(error.__traceback__)[-1].filename != app.__file__:
      raise  # of the file that --config names
    sys.exit(0)  # absl's --help, which ends as if it were an error
  except SyntaxError as error:
    flag = _config_flag(error.filename or "", arguments)
    print(f"error: {flag}: {error.filename}, line {error.lineno}: {error.msg}", file=sys.stderr)
    sys.exit(2)
  except (flags.Error, AttributeError, LookupError, TypeError, ValueError, OSError) as error:
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, (AttributeError, LookupError)) and "ml_collections" not in raised_in:
      raise  # a bug in the file that --config names, whose traceback is of use
    print(f"error: {_one_line(error, arguments)}", file=sys.stderr)
    sys.exit(2)


def _config_flag(file: str, arguments: Sequence[str]) -> str:
  """The flag that names the config file."""
  named = [
    argument.partition("=")[0] for argument in arguments if "=" in argument and os.path.basename(file) in argument
  ]
  return named[0] if file and named else "--config"


def _one_line(error: Exception, arguments: Sequence[str]) -> str:
  """What went wrong, without the tracebacks and quotes that ml_collections wraps it in."""
  text = str(error).strip()
  if isinstance(error, flags.UnrecognizedFlagError):
    near = did_you_mean(error.flagname.partition(".")[0], flags.FLAGS, "--")
    return f"unknown flag --{error.flagname}{near} (see --help)"
  if match := re.fullmatch(r"flag (--\w+)=None: Flag .* must have a value other than None\.", text):
    return f"{match[1]} is missing (see --help)"
  if match := re.fullmatch(r"flag (--[^=]+)=(.*?): (.*)", text, re.DOTALL):
    wanted = next((kind for begin, kind in _REFUSALS.items() if match[3].startswith(begin)), None)
    if wanted:
      return wrong_type(match[1], wanted, match[2])
  if isinstance(error, flags.Error | ValueError):  # perhaps with the traceback of an error within the config file
    places = re.findall(r'^  File "(.+)", line (\d+)', text, re.MULTILINE)
    own = [place for place in places if any(os.path.basename(place[0]) in argument for argument in arguments)]
    is_ours = re.search(r"^\S*ConfigError: ", text, re.MULTILINE)  # and says where to look
    *_, text = re.split(r"^\S*(?:Error|Exception): ", text, flags=re.MULTILINE)
    text += "" if is_ours or not own else " ({}, line {})".format(*own[-1])
  elif isinstance(error, OSError):  # the last of several messages in one
    text = re.sub(r".*\[Errno \d+\] ", "", text, flags=re.DOTALL)
    if (file := re.search("'(.+)'", text)) and (folder := os.path.dirname(file[1])):
      text += did_you_mean(file[1], glob.glob(os.path.join(folder, "*.py")))
    text = f"{_config_flag(file[1] if file else '', arguments)}: {text}"
  elif "get_config" in text:
    flag = re.sub(r".*module '(\w+)_config'.*", r"--\1", text, flags=re.DOTALL)  # ml_collections calls it so
    text = f"{flag}: {text}; a config file has a function get_config()"
  else:  # an override of what is not there
    key, *_ = re.findall(r"\w+", text)
    close = re.search('Did you mean "(.*?)"', text)
    overrides = [argument for argument in arguments if re.match(r"--?\w+\.", argument)]
    named = [argument for argument in overrides if re.search(rf"[.]{key}\b", argument)] or overrides
    hint = f"did you mean {close[1]}?" if close else "all are in megabyte_jax/config/run.py and model.py"
    text = f"there is no such key: {' '.join(named)}; {hint}"
  if text.startswith("get_config() takes 0 positional arguments"):
    text = "this config file has one config: leave out the colon after its name, and what follows"
  return " ".join(text.split())
