#!/usr/bin/env bash
# Trains on a TPU slice of many hosts with one command, run on YOUR machine (it needs gcloud, logged in):
#
#   TPU=my-pod ZONE=us-east5-a REPO=https://github.com/YOU/megabyte_jax \
#     launch/tpu_pod.sh --config=configs/paper/table2.py:pg19_megabyte --workdir=gs://BUCKET/run1 \
#     --config.data.train=gs://BUCKET/pg19/train --config.data.validation=gs://BUCKET/pg19/validation
#
# The slice must exist, for instance:
#   gcloud compute tpus tpu-vm create my-pod --zone=us-east5-a --accelerator-type=v5p-32 --version=v2-alpha-tpuv5
# and its service account must be able to write to the bucket. --workdir must be a bucket (or a mounted file system
# that all hosts share): each host writes its own part of a checkpoint there. The data must be in a bucket or on such a
# file system, too. The batch (here 48) must be a multiple of the chips (here 16).
#
# On the screen: every host's lines, mixed. First the code is fetched and installed (minutes, once), then one line a
# host, in any order:
#
#   process 3 of 4 on t1v-n-1234-w-3: 4 x TPU v5 here, 16 in all; coordinator 10.128.0.7:8482
#
# and from then on only process 0 speaks: `device  16 x TPU v5 (mesh: fsdp 16)`, then steps. After 10 seconds without
# the others a host says whom it waits for; after 5 minutes all give up with an error that names the missing.
#
# The run does not depend on this connection; its output is in ~/megabyte_jax.log of each host. The same command again
# shows it again while the run goes on, and resumes a run that has ended, on this slice or one of another size.
# REVISION=COMMIT takes another commit than the newest of REPO.
# To stop: STOP=1 launch/tpu_pod.sh (with TPU and ZONE). All hosts agree on a step, save it and end. (Ctrl-C only ends
# the connection.)
set -euo pipefail
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"
  exit
fi
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
  pid=\$(cat ~/megabyte_jax.pid 2>/dev/null || true)
  if [ -n \"\$pid\" ] && ps -ww -o args= -p \"\$pid\" | grep -q train.py; then
    echo \"process \$pid is training already; its output:\"
    exec tail -n 20 -f --pid=\"\$pid\" ~/megabyte_jax.log
  fi
  test -d ~/megabyte_jax || git clone -q $(printf %q "$REPO") ~/megabyte_jax
  cd ~/megabyte_jax
  git fetch -q origin
  git checkout -q --detach $(printf %q "${REVISION:-origin/HEAD}")
  . launch/tpu_environment.sh ~/venv
  : > ~/megabyte_jax.log
  nohup ~/venv/bin/python -u train.py$flags > ~/megabyte_jax.log 2>&1 < /dev/null &
  pid=\$!
  echo \$pid > ~/megabyte_jax.pid
  tail -n +1 -f --pid=\$pid ~/megabyte_jax.log
  wait \$pid
"
