"""Starts one or many processes: where the others are, and who speaks.

Who this process is comes from the first of these that tells it:

  1. the flags --coordinator, --num_processes, --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
     JAX_PROCESS_ID in the environment; what is left out is taken from Slurm, Open MPI or a Kubernetes Indexed Job;
  2. Slurm (srun), Open MPI (mpirun), a Cloud TPU slice, a Kubernetes Indexed Job, as JAX detects them.

Where none of them speaks of several processes, the run has one; --num_processes=1 makes it one anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TextIO

from megabyte_jax.errors import ConfigError, require
from megabyte_jax.files.atomic_file import remove_temporaries
from megabyte_jax.parallel.rendezvous import meet

START_SECONDS = 300
_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_NUMBERS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")


@dataclasses.dataclass(frozen=True)
class Place:
  """The place of a process in a run; `devices` are the local ones it may use, None leaves that to JAX, () takes all."""

  coordinator: str
  count: int
  process: int
  devices: tuple[int, ...] | None = None


def start(
  coordinator: str = "",
  num_processes: int = 0,
  process_id: int = -1,
  start_timeout: float = START_SECONDS,
  *,
  agree_on_sigterm: bool = True,
) -> None:
  """Joins the other processes of this run, if there are any; call it before anything else touches a device.

  Every process prints one line with what it sees. After that only process 0 writes to stdout.

  Args:
    coordinator: HOST:PORT of process 0; empty looks into the environment.
    num_processes, process_id: 0 and -1 look into the environment.
    start_timeout: seconds to wait for the others.
    agree_on_sigterm: JAX hears SIGTERM, which ends nothing, and tells all at which step to stop; else SIGTERM does what
      it does in a command of one process.

  Raises:
    ConfigError: what was given does not fit together, or somebody stayed away.
  """
  import jax  # noqa: PLC0415  (command lines are read before JAX is imported)

  require(start_timeout >= 1, f"--start_timeout is {start_timeout}; it must be at least 1")
  if jax.distributed.is_initialized():  # one command called by another, as benchmarks/comparisons.py does
    return
  place = given_place(os.environ, coordinator, num_processes, process_id)
  if place is None and 1 in (num_processes, _number(os.environ, "JAX_NUM_PROCESSES", 0)):
    return  # alone, whatever a cluster says
  place = place or detected_place(os.environ, start_timeout)
  if place is None:
    return
  if place.count > 1:
    meet(place.coordinator, place.count, place.process, timeout=start_timeout)
  jax.config.update("jax_enable_preemption_service", agree_on_sigterm)
  jax.distributed.initialize(
    place.coordinator,
    place.count,
    place.process,
    local_device_ids=place.devices,
    initialization_timeout=int(start_timeout),
    cluster_detection_method="deactivate",  # it has been asked
  )
  if jax.process_count() == 1:
    return
  devices = jax.local_devices()
  print(
    f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {len(devices)} x "
    f"{devices[0].device_kind} here, {jax.device_count()} in all; coordinator {place.coordinator}",
    flush=True,
  )
  if jax.process_index() > 0:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)
  outlive_readers()
  sys.excepthook = _end_by_exception
  _end_at_second_interrupt()


def end(code: int, *, at_once: bool = False) -> NoReturn:
  """Ends this process after an error.

  One of several processes must not wait for the others at its end, as JAX makes it do: they wait for it, in the middle
  of a step.

  Args:
    at_once: wait for nobody, be it the other processes with what they have to say, or this one's own threads, under
      which Python's usual end crashes while they compile.
  """
  jax: Any = sys.modules.get("jax")
  several = hasattr(jax, "distributed") and jax.distributed.is_initialized() and jax.process_count() > 1
  if not (several or at_once):
    sys.exit(code)
  if several and jax.process_index() == 0 and not at_once:
    time.sleep(2)  # the others lose their coordinator with it; those with the same error may say so first
  with contextlib.suppress(OSError, RuntimeError):  # nobody reads any more, or a signal came in the middle of a line
    sys.stdout.flush()
    sys.stderr.flush()
  remove_temporaries()  # no exception does so here
  os._exit(code)


def outlive_readers() -> None:
  """Loses from now on what is printed where nobody reads it any more, or no room is, instead of ending the process.

  A run must not end with the terminal or `tee` that showed it, and one process of several must not end alone: all the
  others would.
  """
  if sys.stdout is not None and not isinstance(sys.stdout, LastingOutput):
    sys.stdout = LastingOutput(sys.stdout)
  if sys.stderr is not None and not isinstance(sys.stderr, LastingOutput):
    sys.stderr = LastingOutput(sys.stderr)


class LastingOutput:
  """A stream whose reader may go away, its terminal be closed or its disk fill up: what is written then is lost."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes as the stream itself does."""
    try:
      return self._stream.write(text)
    except OSError:
      self._lose()
      return len(text)

  def flush(self) -> None:
    """Flushes as the stream itself does."""
    try:
      self._stream.flush()
    except OSError:
      self._lose()

  def _lose(self) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, self._stream.fileno())
    os.close(nowhere)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def _end_at_second_interrupt() -> None:
  """Makes a second Ctrl-C end this process within a moment, with exit code 130.

  Python acts on a signal when its main thread runs Python again; that may wait for another process for minutes. So a
  thread listens.
  """
  heard, hear = os.pipe()
  os.set_blocking(hear, False)
  signal.set_wakeup_fd(hear, warn_on_full_buffer=False)

  def listen() -> None:
    interrupts = 0
    while interrupts < 2:
      interrupts += os.read(heard, 64).count(signal.SIGINT)
    os.write(2, b"interrupted\n")
    remove_temporaries()
    os._exit(130)

  threading.Thread(target=listen, daemon=True).start()


def _end_by_exception(*error: Any) -> None:
  sys.__excepthook__(*error)
  end(1)


def given_place(
  environment: Mapping[str, str], coordinator: str = "", num_processes: int = 0, process_id: int = -1
) -> Place | None:
  """Reads the place that flags and environment variables tell, None where they tell nothing."""
  coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
  if not coordinator:
    require(
      num_processes in (0, 1) and process_id in (-1, 0) and environment.get("JAX_NUM_PROCESSES", "1") == "1",
      "several processes need --coordinator=HOST:PORT of process 0 (or JAX_COORDINATOR_ADDRESS)",
    )
    return None
  count = num_processes or _first_number(environment, _COUNTS)
  process = process_id if process_id >= 0 else _first_number(environment, _NUMBERS)
  if count is None or process is None:
    raise ConfigError(
      f"--coordinator={coordinator} needs --num_processes and --process_id, too (or JAX_NUM_PROCESSES, JAX_PROCESS_ID)"
    )
  require(
    0 <= process < count,
    f"process_id is {process} of {count} processes; they are counted from 0 to num_processes - 1",
  )
  return Place(coordinator, count, process, _shared_node_devices(environment))


def detected_place(environment: Mapping[str, str], timeout: float) -> Place | None:
  """Reads the place as a cluster tells it, None where there is no cluster or one process is all there is."""
  if _is_newer_open_mpi(environment):
    raise ConfigError(
      "this Open MPI does not tell where process 0 is; give --coordinator=HOST:PORT (or JAX_COORDINATOR_ADDRESS)"
    )
  if not (
    ("SLURM_STEP_NODELIST" in environment and _number(environment, "SLURM_NTASKS", 1) > 1)
    or ("OMPI_MCA_orte_hnp_uri" in environment and _number(environment, "OMPI_COMM_WORLD_SIZE", 1) > 1)
    or ("JOB_COMPLETION_INDEX" in environment and importlib.util.find_spec("kubernetes"))
    or _on_tpu_vm(environment)
  ):
    return None
  # JAX offers its detection only together with connecting; this is its first half.
  from jax._src.clusters import ClusterEnv  # noqa: PLC0415

  devices: Sequence[int] | None = _shared_node_devices(environment)
  try:
    coordinator, count, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, devices, None, int(timeout)
    )
  except (RuntimeError, OSError, KeyError, ValueError) as error:
    raise ConfigError(
      f"this looks like a cluster, but its processes cannot be found ({error}); give --coordinator, --num_processes "
      "and --process_id"
    ) from error
  if coordinator is None or count is None or process is None:
    return None
  return Place(coordinator, count, process, None if devices is None else tuple(devices))


def _shared_node_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
  """Returns which GPUs of its node a process of Slurm or Open MPI takes.

  JAX gives process i of a node its GPU i. That is wrong where a process is alone on its node (it would leave the other
  GPUs idle) and where the scheduler shows each process its own GPU alone; then it takes all that it sees.
  """
  rank = _first_number(environment, ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"))
  if rank is None or "JAX_LOCAL_DEVICE_IDS" in environment:
    return None
  here = _first_number(environment, ("OMPI_COMM_WORLD_LOCAL_SIZE",)) or _slurm_tasks_here(environment)
  visible = environment.get("CUDA_VISIBLE_DEVICES", "")
  return () if here == 1 or (visible and "," not in visible) else (rank,)


def _slurm_tasks_here(environment: Mapping[str, str]) -> int | None:
  """Tasks on this node, from a list such as 8(x3),4 of which this node's number picks one."""
  tasks: list[int] = []
  for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
    if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
      tasks += [int(match[1])] * int(match[2] or 1)
  node = _number(environment, "SLURM_NODEID", 0)
  return tasks[node] if node < len(tasks) else None


def _is_newer_open_mpi(environment: Mapping[str, str]) -> bool:
  """Open MPI 5 and later, started by mpirun and not by srun."""
  several = _number(environment, "OMPI_COMM_WORLD_SIZE", 1) > 1
  return several and not environment.keys() & {"OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NODELIST"}


def _on_tpu_vm(environment: Mapping[str, str]) -> bool:
  """Tells whether JAX found TPU chips here, and may use them."""
  from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm  # noqa: PLC0415

  platforms = environment.get("JAX_PLATFORMS", "")
  return running_in_cloud_tpu_vm and (not platforms or "tpu" in platforms)


def _first_number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
  return next((_number(environment, name, 0) for name in names if name in environment), None)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
  text = environment.get(name, "")
  require(not text or text.isdigit(), f"{name}={text} in the environment is not a number")
  return int(text) if text else default


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `start`; `start_from_arguments` reads them."""
  group = parser.add_argument_group("several processes", "a cluster's environment tells these, mostly")
  group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
  group.add_argument("--num_processes", type=int, default=0, metavar="N", help="of this run; 1: alone, on any cluster")
  group.add_argument("--process_id", type=int, default=-1, metavar="I", help="which of them this is, from 0")
  group.add_argument(
    "--start_timeout", type=int, default=START_SECONDS, metavar="SECONDS", help="to wait for the other processes"
  )


def start_from_arguments(args: argparse.Namespace, *, agree_on_sigterm: bool = True) -> None:
  """Calls `start` with what `add_arguments` read."""
  start(args.coordinator, args.num_processes, args.process_id, args.start_timeout, agree_on_sigterm=agree_on_sigterm)
