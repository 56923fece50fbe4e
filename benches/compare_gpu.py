"""rankgrad against PyTorch on one NVIDIA GPU, in turn, at one set of sizes: tokens/s, TFLOP/s, milliseconds, memory, and their ratios.

Cases: methods × contexts, here 12 layers of d 768 with a vocabulary of 32,768 and 65,536 tokens per step. Ways: "rankgrad"
(`rankgrad bench --rounds`), "graphs" (the same with CUDA graphs, if it is asked for), "eager" and "compiled" (torch_gpu.py, which says how
PyTorch is used). Each way of each case is a process that stays until its case has been measured, so that starting and compiling happen once: all get ready first, side by side; then,
case by case, the ways take a few steps each, round by round. rankgrad takes its activations' memory only when its case comes.
Not a test of correctness (benches/reference_steps.py is), not a comparison at equal loss.

TFLOP/s: the matrix products of forward and backward as lab/src/flops.rs counts them, per second of the whole step, on both sides.
Memory: the most that was in use at once: of PyTorch, what its tensors had; of rankgrad, what its report says, if it does.
Given are the median and (min–max) of the rounds, each of which is the median of its steps; ratios are taken in each round.
Run:     benches/compare_gpu.sh [--rankgrad PROGRAM] [--out DIR] [--budget SECONDS] [--methods M,…] [--contexts T,…] [--micro TOKENS]
A trial without a GPU: --device cpu --dim 64 --layers 2 --heads 2 --ffn 128 --vocab 512 --tokens 512 --micro 256 --contexts 128
DIR gets results.jsonl, a line per round as it ends, table.md, and what each process had to say besides, in *.log.
"""

import argparse
from datetime import datetime, timezone
import json
from math import log
import os
from pathlib import Path
import queue
import signal
import subprocess
import sys
from threading import Thread
from time import perf_counter, sleep

from compare import build, output, spread, text

HERE = Path(__file__).resolve().parent
METHODS = ["spectron", "dense-muon", "dense-adamw"]
OURS = ["rankgrad", "graphs"]
WAYS = [*OURS, "eager", "compiled"]
START = perf_counter()


def elapsed() -> float:
    return perf_counter() - START


def tell(message: str):
    print(f"[{elapsed():6.1f} s] {message}", flush=True)


# ---- processes

class Process:
    """A program that is given lines and answers with lines."""

    def __init__(self, name: str, command: list, log: Path, env: dict):
        self.name, self.log, self.failed = name, log, ""
        self.errors = log.open("w")
        self.child = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                      text=True, env={**os.environ, **env})
        self.lines = queue.SimpleQueue()
        Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stdout:
            self.lines.put(line)
        self.lines.put(None)  # it has ended

    def ask(self, question: dict):
        try:
            self.child.stdin.write(json.dumps(question) + "\n")
            self.child.stdin.flush()
        except OSError:
            pass  # it has ended: the answer will say so

    def answer(self, seconds: float) -> dict | None:
        """What it says next; None if that takes longer, or if it failed."""
        try:
            line = self.lines.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            return None
        if line is None:
            said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in said if "rror: " in line.split(" ", 1)[0] + " "]  # Python's, rankgrad's
            self.fail(f"exit status {self.child.wait()}: {(errors or said or ['without a word'])[-1]}")
            return None
        try:
            return {"ready": True} if line == "ready\n" else json.loads(line)
        except json.JSONDecodeError:
            self.fail(f"said: {line.strip()}")
            return None

    def fail(self, why: str):
        self.failed = self.failed or why
        self.end(0.0)

    def end(self, patience: float = 5.0):
        """By the end of its input; if it does not take that, by force."""
        try:
            self.child.stdin.close()
        except OSError:
            pass
        try:
            self.child.wait(patience)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.errors.close()


# ---- what is compared

class Case:
    def __init__(self, method: str, context: int):
        self.method, self.context = method, context
        self.name = f"{method}, {context}"
        self.processes, self.rounds, self.without = {}, {}, {}  # by way: Process, list of results, why there is none


def product_flops(args, case: Case) -> float:
    """Per step; lab/src/flops.rs has the reasons."""
    pairs = 4 * [(args.dim, args.dim)] + 2 * [(args.ffn, args.dim)] + [(args.dim, args.ffn)]  # m × n of a block's matrices
    rank = lambda m, n: int(args.ratio * min(m, n))
    weights = sum(m * n if case.method.startswith("dense") else rank(m, n) * (m + n) for m, n in pairs)
    attention = args.dim * (case.context + 1)  # two products of d columns over (T + 1)/2 keys
    return 3 * args.tokens * 2 * (args.layers * (weights + attention) + args.vocab * args.dim)


def sizes(args, case: Case) -> list:
    values = {k: getattr(args, k) for k in ("vocab", "dim", "layers", "heads", "ffn")}
    values |= {"context": case.context, "batch": args.micro // case.context, "accumulate": args.tokens // args.micro}
    return [x for k, v in values.items() for x in (f"--{k}", v)]


def command(args, case: Case, way: str) -> list:
    if way in OURS:
        precision = "bf16-newton-schulz" if args.precision == "bf16" else args.precision  # as in PyTorch
        return [args.rankgrad, "bench", "--rounds", "--steps", args.steps, "--preset", "mid", "--device", args.device, "--precision",
                precision, "--method", case.method, "--rank-ratio", args.ratio, *sizes(args, case)]
    return [sys.executable, "-B", HERE / "torch_gpu.py", "--way", way, "--device", args.device, "--precision", args.precision,
            "--method", case.method, "--ratio", args.ratio, *sizes(args, case),
            *(["--compile-optimizer"] if args.compile_optimizer else [])]


def start(args, case: Case, way: str) -> Process:
    log = args.out / f"{case.method}-{case.context}-{way}.log"
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(os.cpu_count() // 4, 1))}  # several compile at a time
    # rankgrad finds cuBLAS and NVRTC in the active virtual environment
    here = {"VIRTUAL_ENV": sys.prefix} if sys.prefix != sys.base_prefix else {}
    here["RANKGRAD_CUDA_GRAPHS"] = str(int(way == "graphs"))
    return Process(f"{case.name}, {way}", command(args, case, way), log, here if way in OURS else threads)


def together(args, about: dict, processes: int) -> int:
    """How many may compile and try a step at a time: what fits the GPU, and leaves three cores to each. An estimate."""
    per_token = 14 * args.vocab + args.layers * (40 * args.dim + 12 * args.ffn)  # bytes of activations and logits, if eager
    weights = 16 * (2 * args.vocab * args.dim + args.layers * (4 * args.dim**2 + 3 * args.dim * args.ffn))  # with gradient, momentum
    room = 0.9 * about.get("free_gib", 8.0) * 2**30 - processes * (weights + 2**30)
    return int(max(1, min(room / (args.micro * per_token), os.cpu_count() // 3)))


def get_ready(args, cases: list) -> dict:
    """Starts all and returns what the machine is; who fails, or is not ready in time, is named in its case."""
    contexts = ["--contexts", *args.contexts]
    asks = [sys.executable, "-B", HERE / "torch_gpu.py", "--machine", "--device", args.device, *sizes(args, cases[0]), *contexts]
    asks = Process("machine", asks, args.out / "machine.log", {})
    args.all.append(asks)
    waiting = {way: [(case, way) for case in cases if way in args.ways] for way in WAYS}
    later = waiting["compiled"] + waiting["eager"]  # the longer first
    loading = []  # all at once, while the machine is asked, but not before its files have been read from the disk once
    own = [pair for way in OURS for pair in waiting[way]]  # one after another, each by itself uses all cores
    begun = None
    about, loaded, preparing = {}, [], []

    def over(case: Case, way: str, reply: dict | None, what: str) -> bool:
        process = case.processes[way]
        if process.failed:
            case.without[way] = process.failed
            tell(f"{process.name}: failed: {process.failed}")
        elif reply:
            took = f", {reply['prepare_seconds']:.1f} s" if "prepare_seconds" in reply else ""
            loss = reply.get("losses", [log(args.vocab)])[0]
            if not abs(loss / log(args.vocab) - 1) < 0.05:  # of small random weights, whatever the tokens
                case.without[f"{way}'s loss"] = f"{loss:.4f} before the first step, not about ln V = {log(args.vocab):.4f}"
            tell(f"{process.name}: {what}{took}")
        return bool(process.failed or reply)

    while not about or own or begun or loading or loaded or preparing:
        if not about:
            told = asks.answer(0)
            if told and "imported" in told:
                for case, way in later:
                    case.processes[way] = start(args, case, way)
                    args.all.append(case.processes[way])
                loading, later = later, []
            elif told:
                about = told
                args.record({"machine": about})
                tell(json.dumps(about))
            elif asks.failed:
                sys.exit(f"compare_gpu: {asks.failed.split(': ', 1)[-1]} (more in {asks.log})")
        if own and not begun:
            case, way = begun = own.pop(0)
            case.processes[way] = start(args, *begun)
            args.all.append(case.processes[way])
        if begun and over(*begun, begun[0].processes[begun[1]].answer(0), "ready"):
            begun = None
        for pair in list(loading):
            case, way = pair
            reply = case.processes[way].answer(0)
            if over(case, way, reply, "loaded"):
                loading.remove(pair)
                loaded += [pair] if reply else []
        if about:
            while loaded and len(preparing) < together(args, about, len(args.all)):
                case, way = pair = loaded.pop(0)
                times = about.get("attention_ms", {}).get(str(case.context), {})
                times = {k: t for k, t in times.items() if not isinstance(t, str)}
                kernel = args.attention or min(times, key=times.get, default="flash")
                case.processes[way].ask({"do": "prepare", "attention": kernel})
                preparing.append(pair)
        for case, way in list(preparing):
            if over(case, way, case.processes[way].answer(0), "ready"):
                preparing.remove((case, way))
        if elapsed() > args.prepare:
            late = own + later + loading + loaded + preparing + ([begun] if begun else [])
            for case, way in late:
                case.without[way] = f"not ready after {args.prepare:.0f} s"
                tell(f"{case.name}, {way}: {case.without[way]}")
                if way in case.processes:
                    case.processes[way].fail(case.without[way])
            if not about:
                sys.exit(f"compare_gpu: nothing is known of the machine after {args.prepare:.0f} s; see {asks.log}, or raise --prepare")
            break
        sleep(0.02)
    return about


def measure(args, case: Case):
    ways = [way for way in args.ways if way not in case.without]
    case.rounds = {way: [] for way in ways}
    for r in range(args.rounds):
        if r > 0 and elapsed() > args.budget:
            tell(f"{case.name}: {r} of {args.rounds} rounds, the time is over")
            break
        for way in list(ways)[:: -1 if r % 2 else 1]:  # in reverse every other time, so that none always follows the same one
            process = case.processes[way]
            process.ask({"do": "measure", "untimed": 0 if r else 2, "steps": args.steps})
            began = elapsed()
            reply = process.answer(args.patience)
            if reply is None:
                if not process.failed:
                    process.fail(f"no answer after {args.patience:.0f} s")
                case.without[way] = process.failed
                ways.remove(way)
                args.record({"case": case.name, "way": way, "round": r, "failed": process.failed})
                tell(f"{process.name}: failed: {process.failed}")
                continue
            if "forward_ms" in reply:
                reply["forward_backward_ms"] = reply["forward_ms"] + reply["backward_ms"]
            told, ours = reply.get("product_flops"), product_flops(args, case)
            if reply["tokens_per_step"] != args.tokens or (told and abs(told / ours - 1) > 1e-9):
                case.without["note"] = f"{way} counts {reply['tokens_per_step']} tokens and {told} FLOPs, not {args.tokens} and {ours}"
                tell(f"{case.name}: {case.without['note']}")
            reply["tflops"] = ours / reply["step_ms"] / 1e9
            case.rounds[way].append(reply)
            args.record({"case": case.name, "way": way, "round": r, "seconds": elapsed() - began, **reply})
            tell(f"{process.name}, round {r + 1}: {reply['tokens_per_second']:,.0f} tokens/s, {reply['step_ms']:.1f} ms, of it the "
                 f"optimizer {reply['optimizer_ms']:.1f}; {reply['tflops']:.1f} TFLOP/s")


# ---- tables

def table(args, about: dict, cases: list) -> str:
    device = about.get("gpu", about["device"])
    versions = f"PyTorch {about['torch']}, Triton {about['triton']}, CUDA {about.get('cuda')}, cuDNN {about.get('cudnn')}"
    lines = [
        f"{args.date}: {device}, driver {about.get('driver_version')}; {versions}; rankgrad {args.commit}. {args.layers} layers, "
        f"d {args.dim}, {args.heads} heads, ffn {args.ffn}, vocabulary {args.vocab:,}, rank ratio {args.ratio:g}, {args.tokens:,} tokens "
        f"per step, {args.micro:,} at a time, {args.precision}; {args.rounds} rounds of {args.steps} steps. A large copy: "
        f"{about['copy_tb_per_s']:.2f} TB/s read and written; the product of two large bf16 matrices: {about['product_tflops']:.0f} "
        "TFLOP/s.",
        "",
        "| method, context | | tokens/s | rankgrad is | TFLOP/s | forward and backward, ms | optimizer, ms | memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        own = case.rounds.get("rankgrad", [])
        for way, runs in case.rounds.items():
            if not runs:
                continue
            figure = lambda key, digits: text(spread([r[key] for r in runs]), digits) if runs[0].get(key) is not None else ""
            ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(own, runs)] if way != "rankgrad" else []
            ratio = f"{text(spread(ratios), 2)} times as fast" if ratios else ""
            lines.append(f"| {case.name} | {way} | {figure('tokens_per_second', 0)} | {ratio} | {figure('tflops', 1)} | "
                         f"{figure('forward_backward_ms', 1)} | {figure('optimizer_ms', 1)} | {figure('device_memory_mib', 0)} |")
    missing = [f"- {case.name}, {way}: {why}" for case in cases for way, why in case.without.items()]
    return "\n".join(lines + (["", "Not measured, or not trusted:", *missing] if missing else [])) + "\n"


def write_table(args, about: dict, cases: list):
    new = args.out / "table.md.new"
    new.write_text(table(args, about, cases))
    new.rename(args.out / "table.md")


def arguments():
    words = lambda s: s.replace(",", " ").split()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", type=words, default=["spectron", "dense-muon"], metavar="M,…", help=", ".join(METHODS))
    parser.add_argument("--contexts", type=lambda s: [int(x) for x in words(s)], default=[1024, 2048], metavar="T,…")
    parser.add_argument("--ways", type=words, default=["rankgrad", "eager", "compiled"], metavar="W,…", help=", ".join(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a round; before the first of them two that are not timed")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds of all: cases that would not fit are named, not measured")
    parser.add_argument("--prepare", type=float, help="seconds to be ready in (default: 60 %% of the budget)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a round")
    parser.add_argument("--out", type=Path, help="a directory, new or empty (default: runs/compare-gpu-DATE)")
    parser.add_argument("--rankgrad", type=Path, help="the program, if it is not to be built here")
    parser.add_argument("--commit", help="what to call it (default: as git says)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=["bf16", "f32"], help="default: bf16, on a processor f32")
    parser.add_argument("--attention", choices=["flash", "cudnn"], help="PyTorch's kernel (default: the faster one, tried)")
    parser.add_argument("--compile-optimizer", action="store_true", help="of the compiled way, Spectron's or Muon's step too")
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--micro", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--ratio", type=float, default=0.25, help="rank of a pair as a part of min(in, out)")
    for size, default in {"vocab": 32768, "dim": 768, "layers": 12, "heads": 12, "ffn": 2048}.items():
        parser.add_argument(f"--{size}", type=int, default=default)
    args = parser.parse_args()
    for names, known in ((args.methods, METHODS), (args.ways, WAYS)):
        for name in names:
            if name not in known:
                parser.error(f"unknown {name}; there are: {', '.join(known)}")
    for large, small in [(args.tokens, args.micro), *((args.micro, t) for t in args.contexts)]:
        if small < 1 or large % small:
            parser.error(f"{large} tokens are no multiple of {small}: a step has whole micro-batches, these have whole sequences")
    args.prepare = 0.6 * args.budget if args.prepare is None else args.prepare
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "f32")
    args.date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    args.out = args.out or HERE.parent / "runs" / f"compare-gpu-{args.date[:19].replace(':', '')}"
    args.commit = args.commit or output("git", "describe", "--always", "--dirty") or "of an unknown commit"
    args.all = []  # every Process
    return args


def main():
    args = arguments()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"compare_gpu: {args.out} is not empty: name another --out")
    if set(OURS) & set(args.ways):
        args.rankgrad = (args.rankgrad or build(["-p", "rankgrad-lab", "--features", "cuda", "--bin", "rankgrad"])).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    results = (args.out / "results.jsonl").open("w")

    def record(x: dict):
        print(json.dumps(x), file=results, flush=True)

    args.record = record
    record({"date": args.date, "rankgrad": args.commit, "arguments": sys.argv[1:]})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("compare_gpu: ended from outside"))  # so that `finally` is reached
    cases = [Case(m, t) for t in args.contexts for m in args.methods]
    try:
        about = get_ready(args, cases)
        longest = 0.0
        for case in cases:
            began = elapsed()
            if began + 1.1 * longest > args.budget:
                case.without |= {way: f"would not fit the {args.budget:.0f} s" for way in args.ways if way not in case.without}
                tell(f"{case.name}: skipped, would not fit the {args.budget:.0f} s")
            else:
                measure(args, case)
                longest = max(longest, elapsed() - began)
            for process in case.processes.values():
                process.end()
            write_table(args, about, cases)
    finally:
        for process in args.all:
            process.end(0.0)
    print(f"\n{table(args, about, cases)}\n{args.out}: results.jsonl, table.md, *.log")
    if any(case.without for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
