"""Defines errors that the user can put right; commands print them as one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
  """A mistake that the user can put right; the message names the file, key or size, and says what to do."""


class ConfigError(UserError):
  """A configuration that cannot work; the message names the key and says what to do."""


class FlagError(UserError):
  """A command line that cannot be read; the message names the flag."""


class DataError(UserError):
  """Data that cannot be read as they are; the message names the item and says what to do."""


class CheckpointError(UserError):
  """A saved run that cannot be read or continued as asked; the message says which, why and what to do."""


class PlotError(UserError):
  """A picture that cannot be drawn; the message says why."""


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError(message)` unless `condition` holds."""
  if not condition:
    raise ConfigError(message)
