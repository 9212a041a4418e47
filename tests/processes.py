"""Running a command as several real processes that find each other over loopback."""

import os
import pathlib
import random
import socket
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parents[1]
PORTS = range(12_000, 32_000)  # below those that the kernel gives to outgoing connections


def free_port():
  """A port that nobody uses now; whoever takes it first has it, see `Processes`."""
  while True:
    port = random.SystemRandom().choice(PORTS)
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as trial:
      try:
        trial.bind(("", port))
        return port
      except OSError:
        continue


class Processes:
  """`python ARGUMENTS` in `count` processes with `devices` virtual CPU devices each; `output[i]` grows as they print.

  Should another program take the port just before process 0 does, all are started again with another one.
  """

  def __init__(self, count, devices, *arguments, timeout=240, **variables):
    self.count, self.arguments, self.timeout = count, [str(argument) for argument in arguments], timeout
    self.environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      # The last of two equal flags counts. The others are the tests' own: equal programs give equal bits.
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # a tiny model spends its time in the compiler
      "PYTHONUNBUFFERED": "1",
    }
    self.environment |= variables
    self._start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.running:
      if process.poll() is None:
        process.kill()
      process.wait()

  def _start(self):
    port = free_port()
    self.output = [""] * self.count
    self.running, self._readers = [], []
    for i in range(self.count):
      place = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(self.count)}
      process = subprocess.Popen(
        [sys.executable, *self.arguments],
        cwd=ROOT,
        env=self.environment | place | {"JAX_PROCESS_ID": str(i)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
      reader = threading.Thread(target=self._read, args=(i, process), daemon=True)
      reader.start()
      self.running.append(process)
      self._readers.append(reader)

  def _read(self, i, process):
    for line in process.stdout:
      self.output[i] += line

  def wait_for(self, text, process=0):
    """Returns when `process` has printed `text`."""
    end = time.monotonic() + self.timeout
    while text not in self.output[process]:
      if "cannot listen on port" in self.output[0]:
        self._restart()
      if self.running[process].poll() is not None:
        self._readers[process].join()  # it may have said it and ended since the line above looked
        assert text in self.output[process], self.all_output()
        return
      assert time.monotonic() < end, f"no {text!r} in time\n{self.all_output()}"
      time.sleep(0.05)

  def finish(self, good=True):
    """Waits for the end of all; checks that each exits with 0 (not `good`: with anything else), returns the output."""
    end = time.monotonic() + self.timeout
    while any(process.poll() is None for process in self.running):
      if "cannot listen on port" in self.output[0]:
        self._restart()
      assert time.monotonic() < end, f"not finished in time\n{self.all_output()}"
      time.sleep(0.05)
    for reader in self._readers:
      reader.join()
    assert all((process.returncode == 0) == good for process in self.running), self.all_output()
    return self.output

  def _restart(self):
    self.__exit__()
    self._start()

  def all_output(self):
    return "\n".join(f"== process {i}\n{text[-4000:]}" for i, text in enumerate(self.output))


def run(count, devices, *arguments, **options):
  """What each of `count` processes printed, when all have ended well."""
  with Processes(count, devices, *arguments, **options) as processes:
    return processes.finish()
