#!/bin/sh
# Runs compare_gpu.py, rankgrad against PyTorch on one NVIDIA GPU; arguments are passed on. By the Python of RANKGRAD_PYTHON or else
# `python3`, if it has PyTorch; otherwise by that of a virtual environment, benches/.venv or where RANKGRAD_VENV says, into which
# PyTorch is installed first (3 GB). Needs an NVIDIA GPU with its driver; Rust, unless --rankgrad names the program; and, for
# torch.compile, a C compiler with Python's headers.
set -e
here=$(cd "$(dirname "$0")" && pwd)
has_torch() { "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; }
has_gpu() {
    python3 -c 'import ctypes, sys; c = ctypes.CDLL("libcuda.so.1"); n = ctypes.c_int()
sys.exit(c.cuInit(0) or c.cuDeviceGetCount(ctypes.byref(n)) or n.value < 1)' 2>/dev/null
}
case " $* " in
*" -h "* | *" --help "*) exec python3 -B "$here/compare_gpu.py" --help ;;
*" --device cpu "* | *" --device=cpu "*) ;;
*) has_gpu || { echo "compare_gpu: no NVIDIA GPU here, or no driver (libcuda.so.1) that finds it" >&2; exit 1; } ;;
esac
python=${RANKGRAD_PYTHON:-python3}
if ! has_torch "$python"; then
    venv=${RANKGRAD_VENV:-$here/.venv}
    python=$venv/bin/python
    if ! has_torch "$python"; then
        echo "compare_gpu: no PyTorch beside python3: installing it into $venv" >&2
        test -x "$venv/bin/pip" || python3 -m venv "$venv"
        "$venv/bin/pip" install -q --disable-pip-version-check torch==2.15.0 numpy
    fi
fi
exec "$python" -B "$here/compare_gpu.py" "$@"
