"""rankgrad against PyTorch, one training step on the CPU of this machine, run in turn so that both meet the same noise.

Contenders: rankgrad; "stock", PyTorch as the wheel comes; with --best also "best": MKL's fast path opened on processors
that are not Intel's, and the faster of eager and torch.compile. Each run is a process of its own (torch_bench.py or
`rankgrad bench`). Not a statement about a GPU, nor about loss. Needs a quiet machine: PyTorch's threads wait by spinning,
so that other programs slow it far more than their share; "others" in the table is the share of the cores they took.
Install: benches/compare.sh does it, or: python -m venv .venv && .venv/bin/pip install torch==2.15.0 numpy
Run:     cargo build --release && python compare.py [--presets tiny small] [--rounds 5] [--best] [--out FILE]
"""

import argparse
import json
import os
from pathlib import Path
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from time import perf_counter

HERE = Path(__file__).resolve().parent
PARTS = ["forward_ms", "backward_ms", "optimizer_ms", "step_ms"]
# MKL asks whether the processor is Intel's and takes a slow path if not. A preloaded library answers first.
SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def build_shim(folder: Path) -> Path:
    source, library = folder / "intel.c", folder / "intel.so"
    source.write_text(SHIM)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def busy_seconds() -> float:
    """CPU time that all programs together have used, the hypervisor's share included; NaN where Linux does not tell."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return float("nan")
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # less idle and waiting for disks


def run(command: list, extra_env: dict) -> dict:
    start, busy, own = perf_counter(), busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(c) for c in command], env={**os.environ, **extra_env}, stdout=subprocess.PIPE, text=True)
    wall, used = perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    own_seconds = used.ru_utime + used.ru_stime - own.ru_utime - own.ru_stime
    others = max(busy_seconds() - busy - own_seconds, 0.0) / (wall * os.cpu_count())
    if done.returncode != 0:
        sys.exit(f"compare: exit status {done.returncode} from: {' '.join(map(str, command))}")
    try:
        return {**json.loads(done.stdout), "others": others}
    except json.JSONDecodeError as error:
        sys.exit(f"compare: no JSON object on stdout ({error}) from: {' '.join(map(str, command))}\n{done.stdout}")


def contenders(args, preset: str, method: str, shim: Path | None) -> dict:
    """name → (command, extra environment)"""
    flags = ["--preset", preset, "--method", method, "--threads", args.threads, "--json"]
    torch = [sys.executable, "-B", HERE / "torch_bench.py", *flags]
    found = {"rankgrad": ([args.rankgrad, "bench", *flags], {}), "stock": (torch, {})}
    if shim:
        preload = {"LD_PRELOAD": " ".join(filter(None, [str(shim), os.environ.get("LD_PRELOAD")]))}
        eager, compiled = (torch, preload), ([*torch, "--compile"], preload)
        speed = [run(*c)["tokens_per_second"] for c in (eager, compiled)]  # one trial of each decides
        found["best"] = eager if speed[0] >= speed[1] else compiled
    return found


def spread(runs: list[dict], key: str) -> dict:
    values = [r[key] for r in runs]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(case: dict):
    print(f"\n{case['preset']}, {case['method']}")
    print(f"{'':16}{'tokens/s, median (min–max)':>30}{'ratio':>8}" + "".join(f"{p:>14}" for p in PARTS) + f"{'MiB':>8}{'others':>8}")
    for name, c in case["contenders"].items():
        speed = c["summary"]["tokens_per_second"]
        label = name + (" compiled" if c["runs"][0].get("compiled") else "")
        text = f"{speed['median']:,.0f} ({speed['min']:,.0f}–{speed['max']:,.0f})"
        parts = "".join(f"{c['summary'][p]['median']:14.2f}" for p in PARTS)
        print(f"{label:16}{text:>30}{c['ratio']:8.2f}{parts}{c['summary']['peak_memory_mib']['median']:8.0f}"
              f"{c['summary']['others']['max']:8.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], metavar="P", help="tiny small mid")
    parser.add_argument("--methods", nargs="+", default=["spectron", "dense-adamw"], metavar="M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rankgrad", type=Path, default=HERE.parent / "target" / "release" / "rankgrad")
    parser.add_argument("--best", action="store_true", help="a second PyTorch at its best (compiles: slow to start)")
    parser.add_argument("--out", type=Path, help="all runs and their summaries as JSON")
    args = parser.parse_args()
    if not args.rankgrad.exists():
        sys.exit(f"compare: {args.rankgrad} does not exist; build it with `cargo build --release` or name it with --rankgrad")

    cases = []
    with tempfile.TemporaryDirectory() as folder:
        shim = build_shim(Path(folder)) if args.best else None
        for preset in args.presets:
            for method in args.methods:
                commands = contenders(args, preset, method, shim)
                runs = {name: [] for name in commands}
                for r in range(args.rounds):
                    # every other round in reverse, so that no contender always follows the same one
                    for name in list(commands)[:: -1 if r % 2 else 1]:
                        runs[name].append(run(*commands[name]))
                summary = {
                    name: {key: spread(rs, key) for key in [*PARTS, "tokens_per_second", "peak_memory_mib", "others"]}
                    for name, rs in runs.items()
                }
                speed = {name: s["tokens_per_second"]["median"] for name, s in summary.items()}
                cases.append({
                    "preset": preset, "method": method,
                    "contenders": {
                        name: {"ratio": speed["rankgrad"] / speed[name], "summary": summary[name], "runs": runs[name]}
                        for name in runs
                    },
                })
                show(cases[-1])
    print("\nratio: tokens per second of rankgrad over those of the line; above 1 rankgrad is the faster.")
    worst = max(c["summary"]["others"]["max"] for case in cases for c in case["contenders"].values())
    if worst > 0.05:
        print(f"Do not quote this table: other programs took up to {worst:.0%} of the cores during a run.")
    if args.out:
        machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()}
        out = {"machine": machine, "threads": args.threads, "rounds": args.rounds, "cases": cases}
        args.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
