#!/usr/bin/env bash
# Trains on one TPU VM (one host: v5e-1, -4 or -8, v4-8, v5p-8, v6e-8, ...). Run this ON the VM, in the repository:
#
#   launch/tpu_vm.sh --config=configs/quickstart.py --workdir=gs://BUCKET/quickstart
#
# On the screen: pip's output the first time; then within a minute
#
#   device  8 x TPU v5 lite (mesh: data 8)
#   model   megabyte, ... parameters, context 256 bytes, ...
#   step   50/2300  loss 2.9123  bpb 4.2016 ...  MB/s  ... MFU
#
# `device  1 x cpu` instead means that JAX has no TPU support (see below) or that another program holds the chips:
# `sudo lsof -w /dev/accel* /dev/vfio/*` names it. Ctrl-C saves and stops; the same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-$HOME/venv}
if [[ ! -x $venv/bin/python ]]; then
  python3 -m venv "$venv" # needs Python 3.11 or newer
  "$venv/bin/pip" install -q -r requirements.txt "jax[tpu]"
fi
exec "$venv/bin/python" train.py "$@"
