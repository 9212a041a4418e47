# Sourced, in the repository, with a folder: makes there a Python environment for TPUs and buckets, or brings it up to
# date. By uv, because the Python of a TPU VM may be older than the 3.11 that is needed.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m uv --version >/dev/null 2>&1 || python3 -m pip install -q --user uv
[ -x "$1/bin/python" ] || python3 -m uv venv -q --python '>=3.11' "$1"
python3 -m uv pip install -q --python "$1/bin/python" -e '.[gcs]' 'jax[tpu]'
