"""Makes the processes of a run wait for each other and name those that are missing, which JAX's start-up does not.

JAX connects in silence, and aborts with a stack trace if a process stays away too long. So all processes meet here
first, on the port that JAX's coordinator will use. Process 0 listens until all others have connected; then all release
the port at once. Each line of the protocol is a JSON object.
"""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from megabyte_jax.errors import ConfigError

_HELLO = "megabyte_jax"
_NEWS_SECONDS = 2.0  # how often process 0 tells who is missing
_LONGEST_LINE = 1 << 16
_ALONE = " (to run one process alone, give --num_processes=1)"


def meet(coordinator: str, count: int, process: int, *, timeout: float, patience: float = 10.0) -> None:
  """Waits until all `count` processes have connected; from time to time prints to stderr which are missing.

  Args:
    coordinator: HOST:PORT at which process 0 can be reached.
    count: number of processes.
    process: number of this process, from 0.
    timeout: seconds after which the wait ends.
    patience: seconds before the first message.

  Raises:
    ConfigError: a process is missing at the end, the port is in use, or processes disagree on numbers or count.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ConfigError(f"the coordinator is {coordinator!r}; give HOST:PORT of process 0, for instance 10.0.0.1:8476")
  end = time.monotonic() + timeout
  tell = _Teller(f"process {process} of {count} on {socket.gethostname()}", patience)
  if process == 0:
    _receive(coordinator, int(port), count, end, tell)
  else:
    _call(coordinator, host.strip("[]"), int(port), count, process, end, tell)


class _Teller:
  """Prints that this process waits: first after `patience` seconds, then ever more rarely."""

  def __init__(self, who: str, patience: float):
    self.who, self._pause, self._next = who, patience, time.monotonic() + patience

  def __call__(self, why: str) -> None:
    if time.monotonic() >= self._next:
      print(f"{self.who}: waiting for {why}", file=sys.stderr, flush=True)
      self._pause = min(2 * self._pause, 60.0)
      self._next = time.monotonic() + self._pause


def _receive(coordinator: str, port: int, count: int, end: float, tell: Callable[[str], None]) -> None:
  """Listens, as process 0, until all others are connected, then tells them to go."""
  _allow_many_lines()
  try:
    # Without SO_REUSEPORT, which the server to come sets: so a second run on the same port is noticed.
    both = socket.has_dualstack_ipv6()
    listener = socket.create_server(
      ("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=4096, dualstack_ipv6=both
    )
  except OSError as error:
    raise ConfigError(
      f"process 0 cannot listen on port {port} of {coordinator} ({error.strerror}); is another run using it, or was "
      "another process told that it is process 0? Take another port"
    ) from error
  present: dict[int, socket.socket] = {}
  with listener, selectors.DefaultSelector() as selector:
    selector.register(listener, selectors.EVENT_READ)
    next_news, missing = time.monotonic(), list(range(1, count))
    try:
      while missing:
        ready = selector.select(timeout=0.2)
        for key, _ in sorted(ready, key=lambda event: event[0].fileobj is listener):  # who left, then who comes
          if key.fileobj is listener:
            _welcome(listener.accept()[0], count, present, selector)
          elif not _is_alive(present[key.data]):  # it gave up or was killed: it may call again
            selector.unregister(key.fileobj)
            present.pop(key.data).close()
        missing = [i for i in range(1, count) if i not in present]
        if not missing:
          break
        if time.monotonic() >= next_news:
          next_news = time.monotonic() + _NEWS_SECONDS
          for line in present.values():
            _say(line, missing=missing)
        tell(f"{_names(missing)} to call {coordinator}")
        if time.monotonic() >= end:
          absent = f"{_names(missing)} of {count} did not start in time; look at their output, and whether they reach "
          absent += f"{coordinator}{_ALONE}"
          for line in present.values():
            _say(line, error=absent)
          raise ConfigError(absent)
      for line in present.values():
        _say(line, go=True)
    finally:
      for line in present.values():
        line.close()


def _allow_many_lines() -> None:
  """Raises the limit on open files to the hard limit: the default is often 1,024, too few for a large run."""
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _welcome(
  line: socket.socket, count: int, present: dict[int, socket.socket], selector: selectors.BaseSelector
) -> None:
  """Registers a process that connects, or tells it the reason for refusal."""
  try:
    line.settimeout(5)
    hello = _hear(line)
    process = hello.get("process")
    if hello.get("hello") != _HELLO or not isinstance(process, int):
      raise ValueError("a stranger")
  except (OSError, ValueError):  # a port scanner, or somebody who hung up
    line.close()
    return
  error = ""
  if hello.get("count") != count:
    error = f"process 0 was told of {count} processes, process {process} of {hello.get('count')}; tell all the same"
  elif process in present:
    error = f"two processes were told that they are process {process}; give each of the {count} its own number"
  if error:
    _say(line, error=error)
    line.close()
    return
  present[process] = line
  selector.register(line, selectors.EVENT_READ, process)


def _call(
  coordinator: str, host: str, port: int, count: int, process: int, end: float, tell: Callable[[str], None]
) -> None:
  """Connects to process 0, repeatedly if need be, until it says go; for all other processes."""
  trouble = "no answer"
  while time.monotonic() < end:
    try:
      with socket.create_connection((host, port), timeout=5) as line:
        _say(line, hello=_HELLO, process=process, count=count)
        line.settimeout(3 * _NEWS_SECONDS + 5)
        while True:
          news = _hear(line)
          if "error" in news:
            raise ConfigError(news["error"])
          if news.get("go"):
            return
          missing = [i for i in news.get("missing", ()) if i != process]
          if missing:
            tell(f"{_names(missing)} to call {coordinator} (process 0 is there)")
    except (OSError, ValueError) as error:
      if isinstance(error, ConfigError):
        raise
      trouble = getattr(error, "strerror", None) or str(error) or type(error).__name__
      tell(f"process 0 at {coordinator} ({trouble})")
      time.sleep(0.5)
  raise ConfigError(
    f"process {process} of {count} on {socket.gethostname()} could not reach process 0 at {coordinator} ({trouble}); "
    f"is it running, is the address right, does a firewall close the port?{_ALONE}"
  )


def _names(processes: Sequence[int]) -> str:
  """Formats process numbers: "process 3", "processes 1, 2", or the first few of many."""
  shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
  return f"process{'es' if len(processes) > 1 else ''} {shown}"


def _say(line: socket.socket, **message: Any) -> None:
  with contextlib.suppress(OSError):  # it hung up, which is seen when its line is read
    line.sendall(json.dumps(message).encode() + b"\n")


def _hear(line: socket.socket) -> dict[str, Any]:
  """Reads the next message; raises ValueError or OSError if there is none."""
  text = b""
  while not text.endswith(b"\n"):
    byte = line.recv(1)
    if not byte or len(text) > _LONGEST_LINE:
      raise ValueError("the line was closed")
    text += byte
  try:
    message = json.loads(text)
  except RecursionError:  # from somebody else, who found the port open
    message = None
  if not isinstance(message, dict):
    raise ValueError("not a message")
  return message


def _is_alive(line: socket.socket) -> bool:
  try:
    return bool(line.recv(1))
  except OSError:
    return False
