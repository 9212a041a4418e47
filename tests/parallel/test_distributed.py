import os
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import free_port

from megabyte_jax.commands.arguments import Parser
from megabyte_jax.errors import ConfigError
from megabyte_jax.parallel import distributed, rendezvous
from megabyte_jax.parallel.distributed import Place, detected_place, given_place
from megabyte_jax.parallel.rendezvous import meet

SLURM = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "node[07-09]",
  "SLURM_NTASKS": "12",
  "SLURM_PROCID": "6",
  "SLURM_LOCALID": "2",
  "SLURM_NODEID": "1",
  "SLURM_STEP_TASKS_PER_NODE": "4(x3)",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}


def gather(*calls, timeout=10, patience=60):
  """Calls meet(coordinator, count, process) for each (count, process), all at once; each ConfigError's text or None."""
  coordinator = f"localhost:{free_port()}"

  def call(count, process):
    try:
      meet(coordinator, count, process, timeout=timeout, patience=patience)
    except ConfigError as error:
      return str(error)

  with ThreadPoolExecutor(len(calls)) as threads:
    return [result.result() for result in [threads.submit(call, *who) for who in calls]]


def test_all_meet():
  assert gather((4, 3), (4, 0), (4, 2), (4, 1)) == [None] * 4


def test_more_meet_than_files_may_be_open():
  """The soft limit is where a system's default is with 1,000 processes: below what process 0 needs."""
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  probe = os.open(os.devnull, os.O_RDONLY)
  os.close(probe)
  resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 20, limits[1]))
  try:
    assert gather(*((60, i) for i in range(60)), timeout=60) == [None] * 60
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_port_is_free_again_after_the_meeting():
  port = free_port()
  other = threading.Thread(target=meet, args=(f"localhost:{port}", 2, 1), kwargs={"timeout": 10})
  other.start()
  meet(f"localhost:{port}", 2, 0, timeout=10)
  with socket.create_server(("", port)):
    other.join()


def test_all_are_told_who_is_missing(monkeypatch, capsys):
  monkeypatch.setattr(rendezvous, "_NEWS_SECONDS", 0.2)
  raised = gather((4, 0), (4, 2), timeout=4, patience=0.1)
  said = capsys.readouterr().err
  assert "process 0 of 4 on " in said
  assert "waiting for processes 1, 2, 3 to call localhost:" in said or "waiting for processes 1, 3 to call" in said
  assert "process 2 of 4 on " in said
  assert "(process 0 is there)" in said
  assert raised[0] == raised[1]
  assert raised[0].startswith("processes 1, 3 of 4 did not start in time")
  assert raised[0].endswith("(to run one process alone, give --num_processes=1)")


def test_an_absent_coordinator_is_named(capsys):
  [raised] = gather((2, 1), timeout=1.5, patience=0.1)
  assert "process 1 of 2" in raised
  assert "could not reach process 0 at localhost:" in raised
  assert raised.endswith("(to run one process alone, give --num_processes=1)")
  assert "waiting for process 0 at localhost:" in capsys.readouterr().err


def test_a_process_that_died_while_waiting_may_come_again():
  port = free_port()
  error = []

  def first():
    try:
      meet(f"localhost:{port}", 3, 0, timeout=20)
    except ConfigError as e:
      error.append(e)

  server = threading.Thread(target=first)
  server.start()
  for _ in range(100):
    try:
      dying = socket.create_connection(("localhost", port))
      break
    except OSError:
      time.sleep(0.05)
  dying.sendall(b'{"hello": "megabyte_jax", "process": 1, "count": 3}\n')
  dying.recv(1)
  dying.close()
  with socket.create_connection(("localhost", port)) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    others = [threading.Thread(target=meet, args=(f"localhost:{port}", 3, i), kwargs={"timeout": 20}) for i in (1, 2)]
    for thread in [*others]:
      thread.start()
    for thread in [*others, server]:
      thread.join()
  assert not error


def test_processes_that_disagree_are_told():
  raised = gather((2, 0), (3, 1), timeout=3)
  assert "process 0 was told of 2 processes, process 1 of 3" in raised[1]
  raised = gather((3, 0), (3, 1), (3, 1), timeout=3)
  assert sum("two processes were told that they are process 1" in (text or "") for text in raised) == 1


def test_a_port_in_use_is_named():
  port = free_port()
  with socket.create_server(("", port)), pytest.raises(ConfigError, match=f"cannot listen on port {port}"):
    meet(f"localhost:{port}", 2, 0, timeout=1)


@pytest.mark.parametrize("coordinator", ["host", "host:", "host:x", ":5", "host:0", "host:70000"])
def test_an_impossible_address_is_an_error(coordinator):
  with pytest.raises(ConfigError, match="give HOST:PORT"):
    meet(coordinator, 2, 1, timeout=1)


def test_flags_go_before_the_environment_and_the_environment_fills_in():
  assert given_place({}) is None
  assert given_place({}, "h:1", 4, 3) == Place("h:1", 4, 3)
  environment = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}
  assert given_place(environment) == Place("h:1", 4, 0)
  assert given_place(environment, "i:2", 3, 2) == Place("i:2", 3, 2)
  kubernetes = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}
  assert given_place(kubernetes) == Place("h:1", 2, 1)
  assert given_place(OPEN_MPI, "h:1") == Place("h:1", 2, 1, ())


@pytest.mark.parametrize(
  ("environment", "arguments", "message"),
  [
    ({}, ("", 2, 0), "several processes need --coordinator"),
    ({"JAX_NUM_PROCESSES": "2"}, (), "several processes need --coordinator"),
    ({}, ("h:1", 2), "needs --num_processes and --process_id"),
    ({}, ("h:1", 2, 2), "process_id is 2 of 2"),
    ({"JAX_NUM_PROCESSES": "two"}, ("h:1",), "JAX_NUM_PROCESSES=two in the environment is not a number"),
  ],
)
def test_what_does_not_fit_together_is_an_error(environment, arguments, message):
  with pytest.raises(ConfigError, match=message):
    given_place(environment, *arguments)


def detected(monkeypatch, environment):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  return detected_place(environment, 5)


def test_slurm(monkeypatch):
  assert detected(monkeypatch, SLURM) == Place("node07:61441", 12, 6, (2,))


def test_a_process_alone_on_its_node_takes_all_gpus(monkeypatch):
  alone = SLURM | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4,1(x2)"}
  assert detected(monkeypatch, alone).devices == ()


def test_a_process_that_sees_one_gpu_takes_it(monkeypatch):
  assert detected(monkeypatch, SLURM | {"CUDA_VISIBLE_DEVICES": "0"}).devices == ()
  assert detected(monkeypatch, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).devices == (2,)


def test_open_mpi(monkeypatch):
  uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
  place = detected(monkeypatch, OPEN_MPI | uri)
  assert place == Place(place.coordinator, 2, 1, ())
  assert place.coordinator.startswith("10.96.0.1:")
  with pytest.raises(ConfigError, match="this Open MPI does not tell where process 0 is"):
    detected_place(OPEN_MPI, 5)


@pytest.mark.parametrize("environment", [{}, SLURM | {"SLURM_NTASKS": "1"}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}])
def test_where_nobody_speaks_of_others_a_process_stays_single(environment):
  assert detected_place(environment | {"JAX_PLATFORMS": "cpu"}, 5) is None


@pytest.mark.parametrize("told", [{}, {"JAX_NUM_PROCESSES": "1"}])
def test_one_process_is_alone_on_any_cluster(monkeypatch, told):
  """Where Slurm speaks of others, for whom it would wait."""
  for name, value in (SLURM | told).items():
    monkeypatch.setenv(name, value)

  def detected(environment, timeout):
    raise AssertionError("the cluster was asked")

  monkeypatch.setattr(distributed, "detected_place", detected)
  distributed.start(num_processes=0 if told else 1)
  with pytest.raises(AssertionError, match="the cluster was asked"):
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    distributed.start()


def test_output_outlives_its_reader():
  reading, writing = os.pipe()
  with os.fdopen(writing, "w", buffering=1) as stream:
    lasting = distributed.LastingOutput(stream)
    print("read", file=lasting)
    assert os.read(reading, 100) == b"read\n"
    os.close(reading)
    print("lost", file=lasting, flush=True)
    print("lost, too", file=lasting, flush=True)
    assert lasting.fileno() == writing


def test_output_outlives_a_full_disk():
  with open("/dev/full", "w", buffering=1) as stream:
    lasting = distributed.LastingOutput(stream)
    print("lost", file=lasting, flush=True)
    print("lost, too", file=lasting, flush=True)


def test_arguments(monkeypatch):
  given = []
  monkeypatch.setattr(distributed, "start", lambda *place, **options: given.append(place))
  parser = Parser("python test.py")
  distributed.add_arguments(parser)
  distributed.start_from_arguments(parser.parse_args([]))
  flags = ["--coordinator=h:1", "--num-processes=2", "--process-id=1", "--start-timeout=9"]
  distributed.start_from_arguments(parser.parse_args(flags))
  assert given == [("", 0, -1, 300), ("h:1", 2, 1, 9)]
