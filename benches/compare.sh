#!/bin/sh
# Installs PyTorch (3 GB, the first time) into benches/.venv, or where RANKGRAD_VENV says, and runs compare.py there, which
# compiles what it needs of this repository; arguments are passed on. Needs Rust, Python 3 and, for PyTorch's best, C and C++
# compilers.
set -e
here=$(cd "$(dirname "$0")" && pwd)
venv=${RANKGRAD_VENV:-$here/.venv}
test -x "$venv/bin/pip" || python3 -m venv "$venv"
"$venv/bin/python" -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.15.0"))' 2>/dev/null ||
    "$venv/bin/pip" install -q --disable-pip-version-check torch==2.15.0 numpy
exec "$venv/bin/python" -B "$here/compare.py" "$@"
