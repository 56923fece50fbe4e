"""The SVD that `import` makes factor pairs with, against numpy's in f64, in turn on this machine: seconds and their ratio.

Both get a Gaussian matrix of the same shape (their own draws: the time does not depend on them) and make the best pair of half the full
rank. Needs numpy (pip install numpy):
    python3 benches/svd.py [--outputs 1024] [--inputs 4096] [--threads 2] [--rounds 3]
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys

NUMPY = """
import sys, time, numpy as np
m, n = map(int, sys.argv[1:])
w = np.random.default_rng(1).standard_normal((m, n))
start = time.perf_counter()
u, s, vt = np.linalg.svd(w, full_matrices=False)
r = min(m, n) // 2
a, b = u[:, :r] * np.sqrt(s[:r]), (vt[:r].T * np.sqrt(s[:r]))
print(time.perf_counter() - start, np.sqrt((s[r:] ** 2).sum() / (s ** 2).sum()))
"""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for flag, default in [("--outputs", 1024), ("--inputs", 4096), ("--threads", 2), ("--rounds", 3)]:
    parser.add_argument(flag, type=int, default=default)
args = parser.parse_args()
shape = [str(args.outputs), str(args.inputs)]
here = Path(__file__).resolve().parent
build = ["cargo", "build", "--release", "--bench", "parts", "--message-format=json-render-diagnostics"]
lines = subprocess.run(build, cwd=here.parent, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
parts = [m["executable"] for m in map(json.loads, lines) if m.get("executable")][-1]
ours = [parts, "svd", "--outputs", shape[0], "--inputs", shape[1], "--threads", str(args.threads)]
threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
times = []
for _ in range(args.rounds):
    mine = json.loads(subprocess.run(ours, check=True, stdout=subprocess.PIPE, text=True).stdout)
    command = [sys.executable, "-c", NUMPY, *shape]
    theirs = subprocess.run(command, env={**os.environ, **threads}, check=True, stdout=subprocess.PIPE, text=True)
    seconds, error = map(float, theirs.stdout.split())
    # of two Gaussian draws of this size the errors differ by less than a per mille
    assert abs(mine["relative_error"] / error - 1) < 0.01, (mine, error)
    times.append((mine["seconds"], seconds, mine["seconds"] / seconds))
for name, values in zip(["rankgrad, s", "numpy, s", "rankgrad / numpy"], zip(*times)):
    print(f"{name:20}{statistics.median(values):8.2f} ({min(values):.2f}–{max(values):.2f})")
