#!/usr/bin/env bash
# Trains on one TPU VM (one host: v5e-1, -4 or -8, v4-8, v5p-8, v6e-8, ...). Run this ON the VM, in the repository:
#
#   launch/tpu_vm.sh --config=configs/quickstart.py --workdir=gs://BUCKET/quickstart
#
# The quick start brings its data. With your own, on a disk of the VM or in a bucket:
#
#   launch/tpu_vm.sh --config=configs/small.py --config.batch_size=8 --workdir=gs://BUCKET/run1 \
#     --config.data.train=gs://BUCKET/books/train --config.data.validation=gs://BUCKET/books/validation
#
# The batch must be a multiple of the chips (else an error says which sizes would do).
#
# On the screen: the installer's output the first time; then within a minute
#
#   device  8 x TPU v5 lite (mesh: seq 8)
#   model   megabyte, ... parameters, context 256 bytes, ...
#   step   100/2800  loss ...  bpb ...  MB/s  ... (...% of peak)
#
# `device  1 x cpu` instead means that JAX has no TPU support (see below) or that another program holds the chips:
# `sudo lsof -w /dev/accel* /dev/vfio/*` names it. Ctrl-C saves and stops; the same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-$HOME/venv}
source launch/tpu_environment.sh "$venv"
exec "$venv/bin/python" train.py "$@"
