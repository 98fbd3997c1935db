#!/bin/sh
# One run of at most eight minutes on a GPU; benchmarks/gpu.py says what it measures. With llama2.c beside it:
#   LLAMA2C=~/llama2.c benchmarks/gpu.sh
# PYTHON names the interpreter; by default it is that of .venv, which `make demo` sets up.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
PYTHONPATH=$root exec "$PYTHON" -m benchmarks.gpu ${LLAMA2C:+"--peer-train=$LLAMA2C"} "$@"
