#!/usr/bin/env bash
# Trains on a TPU slice of many hosts with one command, run on YOUR machine (it needs gcloud, logged in):
#
#   TPU=my-pod ZONE=us-east5-a REPO=https://github.com/YOU/megabyte_jax \
#     launch/tpu_pod.sh --config=configs/paper/table2.py:pg19_megabyte --workdir=gs://BUCKET/run1
#
# The slice must exist, for instance:
#   gcloud compute tpus tpu-vm create my-pod --zone=us-east5-a --accelerator-type=v5p-64 --version=v2-alpha-tpuv5
# and its service account must be able to write to the bucket. --workdir must be a bucket (or a mounted file system
# that all hosts share): each host writes its own part of a checkpoint there.
#
# On the screen: every host's lines, mixed. First the code is fetched and installed (minutes, once), then one line a
# host, in any order:
#
#   process 3 of 8 on t1v-n-1234-w-3: 4 x TPU v5 here, 32 in all; coordinator 10.128.0.7:8482
#
# and from then on only process 0 speaks: `device  32 x TPU v5 (mesh: fsdp 32)`, then steps. After 10 seconds without
# the others a host says whom it waits for; after 5 minutes all give up with an error that names the missing.
#
# To stop: STOP=1 launch/tpu_pod.sh (with TPU and ZONE). All hosts agree on a step, save it and end.
# The same command again resumes, on this slice or one of another size.
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [[ -n ${STOP:-} ]]; then
  on_all_hosts 'kill -TERM $(cat ~/megabyte_jax.pid)'
  exit
fi

: "${REPO:?git address of the code}"
flags=$(printf ' %q' "$@") # quoted once more for the remote shell
on_all_hosts "
  set -e
  test -d ~/megabyte_jax || git clone -q $(printf %q "$REPO") ~/megabyte_jax
  cd ~/megabyte_jax
  git fetch -q origin
  git checkout -q --detach $(printf %q "${REVISION:-origin/HEAD}")
  test -x ~/venv/bin/python || python3 -m venv ~/venv
  ~/venv/bin/pip install -q -r requirements.txt 'jax[tpu]'
  ~/venv/bin/python -u train.py$flags & echo \$! > ~/megabyte_jax.pid
  wait \$!
"
