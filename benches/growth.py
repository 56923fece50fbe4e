"""How the time of a training step grows with context, width and rank, against the FLOPs that lab/src/flops.rs counts.

Runs `rankgrad bench` at each size, every other round in reverse, and prints the tables of docs/performance.md, "How cost grows".
Two layers of width 256 unless the width is what grows, heads of 64, ffn 8/3 of the width, bytes, method spectron at rank ratio
0.25; 4,096 tokens per step where the context grows, else 1,024 in sequences of 128. One thread, so that a row depends on one
core alone. Not a comparison with other programs (compare.py), nor a profile (`rankgrad bench --profile`).
Run:     cargo build --release && python3 benches/growth.py [--threads 1] [--rounds 2] [--steps 3] [--out FILE]
Needs Python 3 alone; about three minutes on a quiet core. "elapsed/FLOPs" is the growth of the step's time over that of its
FLOPs since the first row: above 1, time grew faster.
"""

import argparse
import json
from pathlib import Path
import statistics
import subprocess
import sys

ROOT = Path(__file__).resolve().parent.parent


def sizes(dim: int = 256, context: int = 128, tokens: int = 1024, method: str = "spectron", ratio: float = 0.25) -> dict:
    return {"dim": dim, "layers": 2, "heads": dim // 64, "ffn": 8 * dim // 3 // 32 * 32, "context": context,
            "batch": tokens // context, "vocab": 256, "method": method, "rank-ratio": ratio}


TABLES = {
    "context": [(f"{t:,}", sizes(context=t, tokens=8192)) for t in (64, 128, 256, 512, 1024, 2048, 4096)],
    "width": [(f"{d:,}", sizes(dim=d)) for d in (128, 256, 512, 1024)],
    "rank ratio": [(f"{r:g}", sizes(dim=512, ratio=r)) for r in (0.0625, 0.125, 0.25, 0.5, 1.0)]
    + [("dense, AdamW", sizes(dim=512, method="dense-adamw")), ("dense, Muon", sizes(dim=512, method="dense-muon"))],
}


def measure(args, size: dict) -> dict:
    flags = [word for name, x in size.items() for word in (f"--{name}", str(x))]
    command = [args.rankgrad, "bench", "--threads", str(args.threads), "--steps", str(args.steps), "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"growth: exit status {done.returncode} from: {' '.join(map(str, command))}")
    return json.loads(done.stdout)


def show(name: str, rows: list):
    """rows: (label, runs)"""
    print(f"\n| {name} | products, GFLOP | forward + backward, ms | GFLOP/s | optimizer, GFLOP | ms | GFLOP/s | elapsed/FLOPs | MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    first = None
    for label, runs in rows:
        median = {k: statistics.median(r[k] for r in runs) for k, x in runs[0].items() if isinstance(x, (int, float))}
        both, optimizer = median["forward_ms"] + median["backward_ms"], median["optimizer_ms"]
        work = median["product_flops"], median["optimizer_flops"]
        relative = (both + optimizer) / sum(work)
        first = first or relative
        print(f"| {label} | {work[0] / 1e9:.2f} | {both:.1f} | {work[0] / both / 1e6:.1f} | {work[1] / 1e9:.3f} | {optimizer:.1f} | "
              f"{work[1] / optimizer / 1e6:.1f} | {relative / first:.2f} | {median['peak_memory_mib']:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=TABLES, action="append", help="one table (may be given several times)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after two that are not")
    parser.add_argument("--rankgrad", type=Path, default=ROOT / "target" / "release" / "rankgrad")
    parser.add_argument("--out", type=Path, help="all runs as JSON")
    args = parser.parse_args()
    if not args.rankgrad.exists():
        sys.exit(f"growth: {args.rankgrad} does not exist; build it with `cargo build --release` or name it with --rankgrad")
    results = {}
    for name in args.only or TABLES:
        table = TABLES[name]
        runs = [[] for _ in table]
        for r in range(args.rounds):
            for i in list(range(len(table)))[:: -1 if r % 2 else 1]:
                runs[i].append(measure(args, table[i][1]))
        rows = [(label, rs) for (label, _), rs in zip(table, runs)]
        show(name, rows)
        results[name] = [{"label": label, "sizes": size, "runs": rs} for (label, size), rs in zip(table, runs)]
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
