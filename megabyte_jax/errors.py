"""Defines errors that the user can put right; commands print them as one line, without a traceback."""

from __future__ import annotations

import re


class UserError(ValueError):
  """A mistake that the user can put right; the message names the file, key or size, and says what to do.

  Its text is one line, whatever the names in it hold: see `in_one_line`. Further lines, such as a command to copy, are
  given one by one.
  """

  def __str__(self) -> str:
    return "\n".join(in_one_line(str(line)) for line in self.args)


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


def in_one_line(text: str) -> str:
  r"""Returns a text with line ends as \n and other control characters but tabs as \xNN.

  Names of files may hold any of them: a terminal's commands, or what would look like another message.
  """
  return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
  return repr(found[0])[1:-1]


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError(message)` unless `condition` holds."""
  if not condition:
    raise ConfigError(message)
