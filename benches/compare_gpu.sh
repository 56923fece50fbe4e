#!/bin/sh
# Runs compare_gpu.py, rankgrad against PyTorch on one NVIDIA GPU; arguments are passed on. By the Python of RANKGRAD_PYTHON or else
# `python3`, if it has PyTorch; otherwise by that of a virtual environment, benches/.venv or where RANKGRAD_VENV says, into which
# PyTorch is installed first (3 GB). Needs an NVIDIA GPU with its driver; Rust, unless --rankgrad names the program; and, for
# torch.compile, a C compiler with Python's headers.
set -e
here=$(cd "$(dirname "$0")" && pwd)
has_torch() { "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; }
python=${RANKGRAD_PYTHON:-python3}
if ! has_torch "$python"; then
    case " $* " in
    *" --device cpu "* | *" --device=cpu "* | *" -h "* | *" --help "*) ;;
    *) nvidia-smi -L 2>/dev/null | grep -q GPU || { echo "compare_gpu: nvidia-smi finds no NVIDIA GPU here" >&2; exit 1; } ;;
    esac
    venv=${RANKGRAD_VENV:-$here/.venv}
    python=$venv/bin/python
    if ! has_torch "$python"; then
        echo "compare_gpu: no PyTorch beside python3: installing it into $venv" >&2
        test -x "$venv/bin/pip" || python3 -m venv "$venv"
        "$venv/bin/pip" install -q --disable-pip-version-check torch==2.15.0 numpy
    fi
fi
exec "$python" -B "$here/compare_gpu.py" "$@"
