"""The recipes are run with stand-ins for gcloud, srun and python that show what they were given."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from megabyte_jax.config import Config
from megabyte_jax.parallel.sharding import check_mesh, make_mesh

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAIN = ["--config=a b.py", "--workdir=gs://bucket/$x"]


def put_program(folder, name, text):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
  (folder / name).chmod(0o755)


def run(script, *arguments, programs, **variables):
  environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | variables
  return subprocess.run(
    ["bash", LAUNCH / script, *arguments], env=environment, text=True, capture_output=True, timeout=60, check=False
  )


@pytest.mark.parametrize(
  "script", ["tpu_vm.sh", "tpu_pod.sh", "tpu_environment.sh", "until_finished.sh", "slurm.sbatch"]
)
def test_scripts_parse(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.mark.parametrize("there", [False, True])
def test_tpu_vm(tmp_path, there):
  """uv makes an environment where there is none, and installs what buckets and TPUs need."""
  log = tmp_path / "log"
  made = f"mkdir -p {tmp_path}/venv/bin; cp {tmp_path}/trained {tmp_path}/venv/bin/python"
  put_program(tmp_path, "trained", 'printf "%s\\n" "$PWD" "$@"')
  put_program(tmp_path, "python3", f'echo "$*" >> {log}; [[ $* != *uv\\ venv* ]] || {{ {made}; }}')
  if there:
    put_program(tmp_path / "venv/bin", "python", 'printf "%s\\n" "$PWD" "$@"')
  result = run("tpu_vm.sh", *TRAIN, programs=tmp_path, VENV=str(tmp_path / "venv"))
  assert result.stdout.splitlines() == [str(ROOT), "train.py", *TRAIN], result.stderr
  asked, *making, installing = log.read_text().splitlines()
  assert making == ([] if there else [f"-m uv venv -q --python >=3.11 {tmp_path}/venv"])
  assert installing == f"-m uv pip install -q --python {tmp_path}/venv/bin/python -e .[gcs] jax[tpu]"


def test_tpu_pod(tmp_path):
  """What reaches the hosts is a script that parses, with the arguments as they were."""
  put_program(tmp_path, "gcloud", 'printf "%s\\n" "$@"')
  result = run("tpu_pod.sh", *TRAIN, programs=tmp_path, TPU="pod", ZONE="z", REPO="https://host/repo")
  assert result.returncode == 0, result.stderr
  head, _, remote = result.stdout.partition("--command=")
  assert head.split() == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z", "--worker=all"]
  subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
  [line] = [line for line in remote.splitlines() if "python -u train.py" in line]
  words = shlex.split(line)
  assert words[0] == "nohup"
  assert words[words.index("train.py") + 1 : words.index(">")] == TRAIN
  stop = run("tpu_pod.sh", programs=tmp_path, TPU="pod", ZONE="z", STOP="1")
  assert "--command=kill -TERM" in stop.stdout
  assert "TPU: name of the TPU slice" in run("tpu_pod.sh", programs=tmp_path).stderr
  shown = run("tpu_pod.sh", "--help", programs=tmp_path).stdout
  assert shown.startswith("Trains on a TPU slice") and "gcloud" in shown and "set -euo" not in shown


def test_the_run_of_a_tpu_pod_outlives_the_connection(tmp_path):
  """The remote script is run here, killed, and run again: it shows the run that goes on, or starts a new one."""
  home = tmp_path / "home"
  put_program(tmp_path, "gcloud", 'for last; do :; done; printf "%s" "${last#--command=}"')
  remote = run("tpu_pod.sh", *TRAIN, programs=tmp_path, TPU="pod", ZONE="z", REPO="https://host/repo").stdout
  put_program(tmp_path, "git", "")
  put_program(home / "megabyte_jax/launch", "tpu_environment.sh", "")
  train = 'echo "${@: -1}"; while [[ ! -e ~/go ]]; do sleep 0.05; done; echo trained; exit 3'
  put_program(home / "venv/bin", "python", train)
  environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(home)}
  options = {"env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
  try:
    with subprocess.Popen(["bash", "-c", remote], **options) as first:
      assert first.stdout.readline().strip() == TRAIN[-1]
      os.kill(first.pid, signal.SIGHUP)
      with subprocess.Popen(["bash", "-c", remote], **options) as again:
        assert "is training already" in again.stdout.readline()
        assert again.stdout.readline().strip() == TRAIN[-1]
        (home / "go").touch()
        assert again.stdout.readline().strip() == "trained"
  finally:
    (home / "go").touch()  # nothing is left running
  with subprocess.Popen(["bash", "-c", remote], **options) as anew:
    assert anew.wait(timeout=20) == 3
    assert anew.stdout.read().split() == [TRAIN[-1], "trained"]


@pytest.mark.parametrize("form", ["--workdir={}", "--workdir {}", ""])
@pytest.mark.parametrize(("steps", "code", "expected"), [(4, 0, 75), (8, 0, 0), (8, 1, 1)])
def test_until_finished(tmp_path, steps, code, expected, form):
  """The stand-in ends when it is told to, as train.py does, with `steps` steps of 8 saved."""
  home = tmp_path / "home"
  (home / "launch").mkdir(parents=True)
  script = home / "launch" / "until_finished.sh"
  script.write_text((LAUNCH / "until_finished.sh").read_text())
  workdir = tmp_path / "run of 8" if form else home / "runs" / "quickstart"
  train = f"trap \"mkdir -p '{workdir}/checkpoints/{steps}'; exit {code}\" TERM; echo started; sleep 60 & wait"
  put_program(tmp_path, "python", f'if [[ $1 == - ]]; then exec {sys.executable} "$@"; fi\n{train}')
  workdir.mkdir(parents=True)
  (workdir / "config.json").write_text('{"num_steps": 8}')
  command = ["bash", script, "--config=a b.py", *(part.format(workdir) for part in form.split(" ") if part)]
  environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == expected


@pytest.mark.parametrize(
  ("code", "left", "again"),
  [
    (0, "9:58", True),
    (0, "08:09", True),
    (0, "5:00:00", False),
    (0, "1-05:00:00", False),
    (0, "", False),
    (1, "9:58", False),
  ],
)
def test_slurm(tmp_path, code, left, again):
  """Exit code 0 near the end of the job's time puts the job into the queue again, and nothing else does."""
  put_program(tmp_path, "srun", f'printf "%s\\n" "$@"; exit {code}')
  put_program(tmp_path, "squeue", f"echo {left}")
  put_program(tmp_path, "scontrol", 'echo "scontrol $*"')
  slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "VENV": "/venv"}
  result = run("slurm.sbatch", *TRAIN, programs=tmp_path, **slurm)
  assert result.returncode == code
  assert result.stdout.splitlines()[:6] == ["--kill-on-bad-exit=1", "/venv/bin/python", "-u", "train.py", *TRAIN]
  assert ("scontrol requeue 7" in result.stdout) == again


def test_kubernetes_names_agree():
  service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
  spec = job["spec"]
  pod = spec["template"]["spec"]
  [container] = pod["containers"]
  variables = {variable["name"]: variable["value"] for variable in container["env"]}
  assert spec["completionMode"] == "Indexed"
  assert str(spec["completions"]) == str(spec["parallelism"]) == variables["JAX_NUM_PROCESSES"]
  name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
  assert pod["subdomain"] == subdomain
  assert service["spec"]["selector"] == {"job-name": name}
  assert service["spec"]["clusterIP"] == "None"
  assert variables["JAX_COORDINATOR_ADDRESS"].rpartition(":")[0] == f"{name}-0.{subdomain}"
  assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
  assert (ROOT / container["command"][0]).stat().st_mode & 0o100


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as laying out a mesh looks at."""

  id: int
  device_kind: str = "cpu"
  platform: str = "cpu"


@pytest.mark.parametrize("recipe", ["tpu_vm.sh", "tpu_pod.sh", "slurm.sbatch", "kubernetes.yaml"])
def test_what_a_recipe_trains_fits_the_devices_it_shows(recipe):
  """Its first config and overrides, on as many devices as the line `device  N x KIND (mesh: ...)` that it promises."""
  text = (LAUNCH / recipe).read_text()
  [count, axes] = re.search(r"device  (\d+) x .*?\(mesh: (.*?)\)", text.replace("device  1 x cpu", "")).groups()
  file, _, name = re.search(r"--config=(\S+)", text)[1].partition(":")
  spec = importlib.util.spec_from_file_location("recipe_config", ROOT / file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config(*([name] if name else []))
  batch_size = re.search(r"--config.batch_size=(\d+)", text)
  values.batch_size = int(batch_size[1]) if batch_size else values.batch_size
  config = Config.from_dict(values)
  mesh = make_mesh(config.mesh, [Device(i) for i in range(int(count))])
  check_mesh(mesh, config.model, config.batch_size // config.accumulate)
  assert axes == ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
  assert recipe == "tpu_vm.sh" or f"{count} in all" in text


def test_configs_named_in_the_recipes_exist():
  for path in LAUNCH.iterdir():
    for word in path.read_text().split():
      if word.startswith("--config=configs/"):
        assert (ROOT / word.partition("=")[2].partition(":")[0]).exists(), f"{path}: {word}"
