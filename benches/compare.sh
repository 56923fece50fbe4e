#!/bin/sh
# Installs PyTorch into benches/.venv (3 GB, the first time) and runs compare.py there; arguments are passed on.
set -e
here=$(cd "$(dirname "$0")" && pwd)
test -x "$here/.venv/bin/pip" || python3 -m venv "$here/.venv"
"$here/.venv/bin/pip" install -q --disable-pip-version-check torch==2.15.0 numpy
exec "$here/.venv/bin/python" -B "$here/compare.py" "$@"
