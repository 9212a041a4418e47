"""The recipes are run with stand-ins for gcloud, srun and python that show what they were given."""

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
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


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh", "slurm.sbatch"])
def test_scripts_parse(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_tpu_vm(tmp_path):
  put_program(tmp_path / "venv/bin", "python", 'printf "%s\\n" "$PWD" "$@"')
  result = run("tpu_vm.sh", *TRAIN, programs=tmp_path, VENV=str(tmp_path / "venv"))
  assert result.stdout.splitlines() == [str(ROOT), "train.py", *TRAIN]


def test_tpu_pod(tmp_path):
  """What reaches the hosts is a script that parses, with the arguments as they were."""
  put_program(tmp_path, "gcloud", 'printf "%s\\n" "$@"')
  result = run("tpu_pod.sh", *TRAIN, programs=tmp_path, TPU="pod", ZONE="z", REPO="https://host/repo")
  assert result.returncode == 0, result.stderr
  head, _, remote = result.stdout.partition("--command=")
  assert head.split() == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z", "--worker=all"]
  subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
  [line] = [line for line in remote.splitlines() if "train.py" in line]
  words = shlex.split(line)
  assert words[words.index("train.py") + 1 : words.index("&")] == TRAIN
  stop = run("tpu_pod.sh", programs=tmp_path, TPU="pod", ZONE="z", STOP="1")
  assert "--command=kill -TERM" in stop.stdout
  assert "TPU: name of the TPU slice" in run("tpu_pod.sh", programs=tmp_path).stderr


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
  assert result.stdout.splitlines()[:5] == ["--kill-on-bad-exit=1", "/venv/bin/python", "-u", "train.py", *TRAIN][:5]
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
  assert container["command"][-1] == "train.py"


def test_configs_named_in_the_recipes_exist():
  for path in LAUNCH.iterdir():
    for word in path.read_text().split():
      if word.startswith("--config=configs/"):
        assert (ROOT / word.partition("=")[2].partition(":")[0]).exists(), f"{path}: {word}"
