"""rankgrad against PyTorch on the CPU of this machine, both run in turn so that they meet the same noise: one table of ratios.

Parts: `step`, tokens per second of a training step; `optimizer`, Spectron's step alone; `products`, forward and backward as a
share of the rate at which this machine does the same matrix products and nothing else; `threads`, two threads over one;
`memory`, the peak of a process that takes a step; `loss`, seconds of training to a validation loss, a recipe of rankgrad's
against nanoGPT's for the CPU (needs the text: RANKGRAD_DATA names the directory of tinyshakespeare.txt).
Contenders: "rankgrad"; "stock", PyTorch as the wheel comes; "best": MKL's fast path opened on processors that are not
Intel's, and the faster of eager and torch.compile. Each run is a process of its own: torch_bench.py, nanogpt_baseline.py,
`rankgrad bench`, `rankgrad train`, or benches/parts.rs. Not a statement about a GPU.
A ratio is taken in each round; given are median and (min–max) of the rounds. Needs a quiet machine: PyTorch's threads wait by
spinning, so that other programs slow it far more than their share; "others" is the share of the cores they took.
Run:     benches/compare.sh [--only step,optimizer] [--presets tiny,small] [--methods spectron] [--rounds 5] [--out FILE]
With --out, results go into FILE beside those of other parts that are there; with --append, so do rounds of one part. So a
table can be made in pieces, when the machine is quiet: compare.sh --out FILE --show prints it.
"""

import argparse
from datetime import datetime, timezone
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
STEP_PARTS = ["forward_ms", "backward_ms", "optimizer_ms", "step_ms"]
METHODS = ["spectron", "dense-adamw", "dense-muon"]
# MKL asks whether the processor is Intel's and takes a slow path if not. A preloaded library answers first.
SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
STEPS = {"tiny": 60, "small": 8, "mid": 2}  # timed steps of a run, after two that are not
SEQUENCE = {"small": 256}  # tokens of one sequence: what the trainer takes at a time
LONGEST = 900  # seconds of a run
UNSTEADY = 0.05  # share of the cores that other programs may take
# A run of all of nanoGPT's CPU recipe ends near 1.88; this is the loss that both must reach.
LOSS = 1.8857
RECIPE = ("--method spectron --layers 3 --context 128 --batch 4 --steps 600 --lr 0.05 --adam-lr 0.01 --warmup 10 --schedule linear "
          "--final-lr-fraction 0 --nesterov --zero-init-output --init-std 0.06").split()

# What the project asks of itself: ratios over "best" and "stock".
STEP_BARS = {"tiny": (2.0, 3.5), "small": (1.5, 2.8), "mid": (2.5, 3.5)}
DENSE_BARS = (1.2, 2.0)


# ---- running

def build_shim(folder: Path) -> Path:
    source, library = folder / "intel.c", folder / "intel.so"
    source.write_text(SHIM)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def build(what: list, how: tuple = ("build",)) -> Path:
    """Compiles one target, if it is not up to date, and returns its executable; a test's by ("test", "--no-run")."""
    command = ["cargo", *how, "--release", "--message-format=json-render-diagnostics", *what]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"compare: exit status {done.returncode} from: {' '.join(command)}")
    executables = [m["executable"] for m in map(json.loads, done.stdout.splitlines()) if m.get("executable")]
    return Path(executables[-1])


def busy_seconds() -> float:
    """CPU time that all programs together have used, the hypervisor's share included; NaN where Linux does not tell."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return float("nan")
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # less idle and waiting for disks


def attempt(command: tuple) -> tuple[dict | None, str]:
    """What a command prints as JSON, or writes into {out}/final.json; or None and the end of its complaint."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        argv = [str(c).replace("{out}", str(out)) for c in command[0]]
        start, busy, own = perf_counter(), busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            done = subprocess.run(argv, env={**os.environ, **command[1]}, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return None, f"not done after {LONGEST} s"
        wall, used = perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        own_seconds = used.ru_utime + used.ru_stime - own.ru_utime - own.ru_stime
        others = max(busy_seconds() - busy - own_seconds, 0.0) / (wall * os.cpu_count())
        if done.returncode != 0:
            return None, f"exit status {done.returncode}: {done.stderr.strip()[-400:]}"
        try:
            text = (out / "final.json").read_text() if out.exists() else done.stdout
            return {**json.loads(text), "wall_seconds": wall, "others": others}, ""
        except (OSError, json.JSONDecodeError) as error:
            return None, f"no JSON ({error}): {done.stdout[-400:]}"


def run(command: tuple) -> dict:
    result, complaint = attempt(command)
    if result is None:
        sys.exit(f"compare: {complaint}\nfrom: {' '.join(map(str, command[0]))}")
    return result


# ---- what is compared: a command is (arguments, extra environment)

class Desk:
    """The programs of both sides, and the cases that are to be measured."""

    def __init__(self, args, folder: Path):
        self.args = args
        self.rankgrad = args.rankgrad or build(["-p", "rankgrad-lab", "--bin", "rankgrad"])
        wants_parts = {"optimizer", "products"} & set(args.only)
        self.parts = (args.parts or build(["-p", "rankgrad", "--bench", "parts"])) if wants_parts else None
        self.fast = {"LD_PRELOAD": " ".join(filter(None, [str(build_shim(folder)), os.environ.get("LD_PRELOAD")]))}

    def torch(self, part: str, preset: str, method: str, *more) -> list:
        return [sys.executable, "-B", HERE / "torch_bench.py", "--part", part, "--preset", preset, "--method", method,
                "--threads", self.args.threads, "--json", *more]

    def steps(self, preset: str) -> int:
        return self.args.steps or STEPS[preset]

    def own(self, preset: str, method: str, threads: int | None = None) -> tuple:
        return [self.rankgrad, "bench", "--preset", preset, "--method", method, "--threads", threads or self.args.threads,
                "--steps", self.steps(preset), "--json"], {}

    def with_torch(self, case: dict, own: tuple, stock: list, figure) -> dict:
        """name → command, with the faster of eager and compiled as "best"; notes in the case how that was decided."""
        commands = {"rankgrad": own, "stock": (stock, {})}
        if self.args.best == "none":
            return commands
        ways = {"eager": (stock, self.fast), "compiled": ([*stock, "--compile"], self.fast)}
        if self.args.best != "try":
            case["best"] = self.args.best
        if "best" not in case:
            case["trials"] = trials = {}
            for name, command in ways.items():
                result, complaint = attempt(command)
                trials[name] = figure(result) if result else complaint
            good = {name: x for name, x in trials.items() if not isinstance(x, str)}
            if not good:
                sys.exit(f"compare: PyTorch fails: {trials['eager']}")
            case["best"] = (min if case["smaller"] else max)(good, key=good.get)
        return {**commands, "best": ways[case["best"]]}

    def case(self, part: str, preset: str, method: str) -> tuple[dict, dict]:
        """The case as it will be written, without runs, and its commands."""
        case = {"part": part, "preset": preset, "method": method, "smaller": part in ("optimizer", "memory", "loss"),
                "figure": {"step": "tokens_per_second", "optimizer": "step_ms", "products": "gflops",
                           "threads": "tokens_per_second", "memory": "peak_memory_mib", "loss": "seconds"}[part],
                "bars": {}}
        earlier = self.args.earlier.get(key(case), {})
        case |= {k: earlier[k] for k in ("best", "trials") if k in earlier}
        figure = lambda r: value(case, r)
        quick = ["--steps", self.steps(preset), "--seconds", 0, "--warmup", 2]
        if part == "step":
            best, stock = STEP_BARS[preset] if method == "spectron" else DENSE_BARS
            case["bars"] = {"best": best, "stock": stock}
            return case, self.with_torch(case, self.own(preset, method), self.torch("step", preset, method, *quick), figure)
        if part == "memory":
            case["bars"] = {"stock": 0.5}
            return case, self.with_torch(case, self.own(preset, method), self.torch("step", preset, method, *quick), figure)
        if part == "optimizer":
            case["bars"] = {"best": 6.0, "stock": 7.0}
            own = [self.parts, "optimizer", "--preset", preset, "--threads", self.args.threads], {}
            return case, self.with_torch(case, own, self.torch("optimizer", preset, method, "--seconds", 3, "--steps", 5), figure)
        if part == "threads":
            case["bars"] = {"one thread": 1.85}
            return case, {"rankgrad": self.own(preset, method), "one thread": self.own(preset, method, 1)}
        if part == "products":
            rows = ["--rows", SEQUENCE[preset]]
            torch = self.torch("products", preset, method, "--seconds", 3, "--steps", 5)
            own = [self.parts, "products", "--preset", preset, "--threads", self.args.threads]
            case["bars"] = {"fastest": 0.65}
            return case, {
                "rankgrad": self.own(preset, method),
                "own products, a sequence": ([*own, *rows], {}), "own products, the batch": (own, {}),
                "PyTorch's, a sequence": ([*torch, *rows], self.fast), "PyTorch's, the batch": (torch, self.fast),
                "stock, the batch": (torch, {}),
            }
        data = self.text()
        case["bars"] = {"best": 4.0, "stock": 6.0}
        case["recipe"] = " ".join(RECIPE)
        own = [self.rankgrad, "train", "--data", data, "--threads", self.args.threads, *RECIPE, "--out", "{out}", "--quiet",
               "--eval-every", 0, "--telemetry-every", 0, "--checkpoint-every", 0], {}
        torch = [sys.executable, "-B", HERE / "nanogpt_baseline.py", "--data", data, "--threads", self.args.threads, "--json"]
        return case, self.with_torch(case, own, torch, figure)

    @staticmethod
    def text() -> Path | None:
        """tinyshakespeare in the directory of data sets, if it is there."""
        directory = os.environ.get("RANKGRAD_DATA")
        path = Path(directory or ".") / "tinyshakespeare.txt"
        return path if directory and path.is_file() else None

    def cases(self):
        """(part, preset, method) in the order of the table."""
        a = self.args
        for part in a.only:
            if part == "step":
                yield from ((part, p, m) for p in a.presets for m in a.methods)
            elif part == "loss":
                if self.text():
                    yield part, "tiny", "recipe"
                else:
                    print("loss: left out, RANKGRAD_DATA names no directory with tinyshakespeare.txt")
            else:
                yield part, "mid" if part in ("optimizer", "memory") else "small", "spectron"


# ---- figures

def key(case: dict) -> str:
    return f"{case['part']} {case['preset']} {case['method']}"


def value(case: dict, r: dict) -> float:
    """The figure that is compared."""
    if case["part"] == "products" and "step_ms" in r:
        # the products of forward and backward, attention's causal half included, per second of both
        return r["gflops"] * r["step_ms"] / (r["forward_ms"] + r["backward_ms"])
    if case["part"] == "loss":
        return r.get("training_seconds", r["seconds"])  # without validation, on both sides
    return r[case["figure"]]


def spread(values: list) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(case: dict):
    """Adds to each contender what its runs come to. The ratio is taken round by round; above 1 rankgrad is the faster."""
    own = case["contenders"]["rankgrad"]["runs"]
    for c in case["contenders"].values():
        keys = [k for k, x in c["runs"][0].items() if isinstance(x, float) or k == "peak_memory_mib"]
        c["summary"] = {k: spread([r[k] for r in c["runs"]]) for k in keys}
        c["figure"] = spread([value(case, r) for r in c["runs"]])
        pairs = [(value(case, a), value(case, b)) for a, b in zip(own, c["runs"])]
        upside = case["smaller"] and case["part"] != "memory"
        c["ratio"] = spread([b / a if upside else a / b for a, b in pairs])
    case["others"] = max(r["others"] for c in case["contenders"].values() for r in c["runs"])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def output(*command) -> str:
    try:
        return subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def circumstances(threads: int) -> dict:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "processor": processor(),
        "cores": os.cpu_count(), "system": platform.platform(), "threads": threads,
        "rankgrad": output("git", "describe", "--always", "--dirty"), "rustc": output("rustc", "--version"),
        "python": platform.python_version(),
    }


# ---- tables

def text(s: dict, digits: int) -> str:
    return f"{s['median']:,.{digits}f} ({s['min']:,.{digits}f}–{s['max']:,.{digits}f})"


def show(case: dict):
    """All contenders of a case."""
    print(f"\n{key(case)}, {case['figure']}" + "".join(
        f"\n  torch {n}: " + (f"{x:,.1f}" if not isinstance(x, str) else f"fails: {x}") for n, x in case.get("trials", {}).items()))
    for name, c in case["contenders"].items():
        label = f"{name} ({case['best']})" if name == "best" else name
        s = c["summary"]
        parts = "".join(f"  {p[:-3]} {s[p]['median']:.1f}" for p in STEP_PARTS if p in s and "forward_ms" in s)
        memory = f"  {s['peak_memory_mib']['median']:.0f} MiB" if "peak_memory_mib" in s else ""
        library = f", {s['library_memory_mib']['median']:.0f} of it the library" if "library_memory_mib" in s else ""
        loss = f"  validation loss {c['runs'][0].get('final_valid_loss', c['runs'][0].get('val_loss')):.4f}" if case["part"] == "loss" else ""
        others = max(r["others"] for r in c["runs"])
        print(f"{label:26}{text(c['figure'], 1):>32}{text(c['ratio'], 2):>22}{parts}{memory}{library}{loss}  others {others:.0%}")


def bars_met(case: dict) -> str:
    """Each bar with the median ratio that must keep to it."""
    ratios = {name: c["ratio"]["median"] for name, c in case["contenders"].items() if name != "rankgrad"}
    ratios["fastest"] = min(ratios.values())
    words = []
    for name, bar in case["bars"].items():
        if name in ratios:
            below = case["part"] == "memory"
            met = ratios[name] <= bar if below else ratios[name] >= bar
            words.append(f"{name} {'≤' if below else '≥'} {bar:g}: {ratios[name]:.2f}, {'met' if met else 'missed'}")
    if case["part"] == "loss":
        worst = max(r["val_loss"] for r in case["contenders"]["rankgrad"]["runs"])
        words.append(f"loss ≤ {LOSS}: {worst:.4f}, {'met' if worst <= LOSS else 'missed'}")
    return "; ".join(words)


def table(cases: list):
    print("\n| part, preset, method | rankgrad | over PyTorch's best | over stock | bars | others |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        c = case["contenders"]
        unit = {"optimizer": " ms", "memory": " MiB", "loss": " s", "products": " GFLOP/s"}.get(case["part"], " tokens/s")
        ratio = lambda name: text(c[name]["ratio"], 2) if name in c else ""
        best = f"{ratio('best')} {case['best']}" if "best" in c else ""
        digits = 0 if c["rankgrad"]["figure"]["median"] >= 1000 else 1
        flag = f"**{case['others']:.0%}**" if case["others"] > UNSTEADY else f"{case['others']:.0%}"
        print(f"| {case['part']}, {case['preset']}, {case['method']} | {text(c['rankgrad']['figure'], digits)}{unit} | {best} | "
              f"{ratio('stock')} | {bars_met(case)} | {flag} |")
    print("\nRatios above 1: rankgrad is the faster; of memory, below 1: it needs less.")
    worst = max((case["others"] for case in cases), default=0.0)
    if worst > UNSTEADY:
        print(f"Do not quote the lines in bold: other programs took up to {worst:.0%} of the cores during a run.")


def main():
    words = lambda s: s.replace(",", " ").split()
    parts = ["step", "optimizer", "products", "threads", "memory", "loss"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=words, default=parts, metavar="PART,…", help=", ".join(parts))
    parser.add_argument("--presets", type=words, default=list(STEPS), metavar="P,…", help="of the part step")
    parser.add_argument("--methods", type=words, default=METHODS, metavar="M,…", help="of the part step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help=f"timed steps of a run, after two that are not (default: {STEPS})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--best", choices=["try", "eager", "compiled", "none"], default="try",
                        help="PyTorch's best: try both once, or skip that")
    parser.add_argument("--out", type=Path, help="all runs and their summaries as JSON")
    parser.add_argument("--append", action="store_true", help="add rounds to those that are in --out")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what is in --out")
    parser.add_argument("--rankgrad", type=Path, help="the program, if it is not to be built here")
    parser.add_argument("--parts", type=Path, help="the bench `parts`, likewise")
    args = parser.parse_args()
    for names, known in ((args.only, parts), (args.presets, STEPS), (args.methods, METHODS)):
        for name in names:
            if name not in known:
                sys.exit(f"compare: unknown {name}; there are: {', '.join(known)}")
    cases = json.loads(args.out.read_text())["cases"] if args.out and args.out.exists() else []
    cases = {key(case): case for case in cases}
    args.earlier = cases if args.append else {}

    with tempfile.TemporaryDirectory() as folder:
        desk = None if args.show else Desk(args, Path(folder))
        for name in desk.cases() if desk else ():
            case, commands = desk.case(*name)
            earlier = args.earlier.get(key(case), {})
            runs = {n: earlier["contenders"][n]["runs"] if n in earlier.get("contenders", {}) else [] for n in commands}
            done = len(runs["rankgrad"])
            for r in range(done, done + args.rounds):
                # every other round in reverse, so that no contender always follows the same one
                for n in list(commands)[:: -1 if r % 2 else 1]:
                    runs[n].append(run(commands[n]))
            case["contenders"] = {n: {"runs": rs} for n, rs in runs.items()}
            case["measured"] = [*earlier.get("measured", []), circumstances(args.threads)]
            if runs["rankgrad"]:
                summarise(case)
                show(case)
            cases[key(case)] = case
            if args.out:  # after each case: what is measured is not lost
                args.out.write_text(json.dumps({"cases": list(cases.values())}, indent=1) + "\n")
    table([case for case in cases.values() if case["contenders"]["rankgrad"]["runs"]])


if __name__ == "__main__":
    main()
