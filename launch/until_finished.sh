#!/usr/bin/env bash
# Runs train.py with the arguments given, for schedulers that take exit code 0 for the end of the work: train.py ends
# with 0 also when a signal has stopped it. This ends with 75 then, and with 0 only when the last step is saved. What it
# is asked to end by (SIGTERM) it passes on, as the first process of a container must.
set -uo pipefail
cd "$(dirname "$0")/.."

python -u train.py "$@" &
train=$!
trap 'kill -TERM "$train"' TERM
wait "$train"
code=$?
while kill -0 "$train" 2>/dev/null; do # a signal ended the wait, not the run
  wait "$train"
  code=$?
done
((code == 0)) || exit "$code"

workdir=runs/quickstart # train.py's own default
while (($#)); do
  case $1 in
    --workdir=* | -workdir=*) workdir=${1#*=} ;;
    --workdir | -workdir) workdir=${2-} ;;
  esac
  shift
done
python - "$workdir" <<'PYTHON' || { echo "not finished: exit code 75, so that it is started again" && exit 75; }
import json, sys
from etils import epath
workdir = epath.Path(sys.argv[1])
steps = json.loads((workdir / "config.json").read_text())["num_steps"]
sys.exit(not (workdir / "checkpoints" / str(steps)).exists())
PYTHON
