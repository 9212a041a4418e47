"""What the commands share: flags, and one line instead of a traceback for what a user can put right."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging

from megabyte_jax.checkpoint import CheckpointError
from megabyte_jax.config import ConfigError
from megabyte_jax.data.sources import DataError

USER_ERRORS = (ConfigError, CheckpointError, DataError, FloatingPointError, PermissionError)


def run(main: Callable[[], None]) -> None:
  """Calls main(); an error that the user can put right becomes one line on stderr and exit code 1."""
  try:
    main()
  except USER_ERRORS as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
  except BrokenPipeError:  # the reader of our output, head for instance, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_config_flags(arguments: Sequence[str]) -> list[str]:
  """absl's flag parsing, where a wrong flag or `--config.key` is one line that names it."""
  try:
    rest = flags.FLAGS(arguments)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # libraries tell a lot at INFO
    return rest
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    text = " ".join(str(error).split())
    print(f"error: {text}\nsee --help, and the fields in megabyte_jax/config.py", file=sys.stderr)
    sys.exit(2)
