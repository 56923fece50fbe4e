"""What to do first on a machine with an NVIDIA GPU, in one command: do the tests pass on it, does training end where it should, and
how fast are the presets' steps, each without and with CUDA graphs. For docs/gpu-measurements.md, and for whoever has a GPU that is not named there.

In this order, so that what matters most is done if time runs out: what is there; the tests (those that docs/gpu.md names) without and with graphs; steps of
each preset in f32 and bf16, without and with graphs in turn; whole trainings in f32, with graphs to the same bits, by two GPUs, if there are two, and by the
processor to the same loss within 0.01, and in bf16; compute-sanitizer's racecheck, if it is there, for what is left of the budget.
Not here: PyTorch (benches/compare_gpu.sh).
Run:     python3 benches/on_gpu.py [--out DIR] [--budget SECONDS] [--device N] [--programs DIR]
DIR gets summary.md and a log of each part. --programs: where `rankgrad`, `ops`, `gpu` (the tests of those names) and `trainer` (the program's own) lie
already compiled; otherwise cargo compiles them. A trial on a driver that is slow: --steps 1 --train-steps 4 --sizes "--dim 32 --layers 1 ..."
"""

import argparse
import json
import os
from pathlib import Path
import re
import shutil
import statistics
import subprocess
import sys

from compare import build
from compare_gpu import elapsed, tell

TESTS = {  # of each test program, what computes on the device
    "ops": ["gpu"],
    "gpu": ["gpu", "attention", "norms", "nothing", "shared", "tensors", "spectron", "order", "round", "nccl", "newton", "rows"],
    "trainer": ["gpu", "bf16"],
}
# Shapes large enough to be of use on a GPU, beside the presets: 16 sequences of 1,024 tokens and a vocabulary of 32,768.
CASES = {"tiny": "--preset tiny", "small": "--preset small", "mid": "--preset mid",
         "mid, 16,384 tokens": "--preset mid --vocab 32768 --context 1024 --batch 16"}
def compile_all(folder: Path):
    """The programs, into `folder`, under the names that --programs asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    test = ("test", "--no-run")
    for name, what, how in [("rankgrad", ["-p", "rankgrad-lab"], ("build",)), ("ops", ["--test", "ops"], test), ("gpu", ["--test", "gpu"], test),
                            ("trainer", ["-p", "rankgrad-lab", "--bin", "rankgrad"], test)]:
        shutil.copy(build(["--features", "cuda", *what], how), folder / name)


class Session:
    """Runs commands until the time is up, each with a log, and keeps what goes into the summary."""

    def __init__(self, args):
        self.args, self.lines, self.began = args, [], elapsed()  # compiling is not of the budget
        self.bad = False

    def say(self, line: str):
        tell(line)
        self.lines.append(line)
        (self.args.out / "summary.md").write_text("\n".join(self.lines) + "\n")

    def left(self) -> float:
        return self.args.budget - (elapsed() - self.began)

    def run(self, name: str, command: list, graphs=False, **env: str) -> str | None:
        """What the command prints; None, and a line in the summary, if it fails or time runs out."""
        if self.left() <= 1:
            self.say(f"- {name}: not done, no time was left")
            return None
        env = {**os.environ, "RANKGRAD_CUDA_GRAPHS": "1" if graphs else "0", **env}
        log = self.args.out / (re.sub(r"\W+", "-", name) + ".log")
        with log.open("w") as errors:
            try:
                done = subprocess.run([str(c) for c in command], cwd=self.args.out, env=env, stdout=subprocess.PIPE, stderr=errors, text=True,
                                      timeout=self.left())
            except subprocess.TimeoutExpired as stopped:
                said = stopped.stdout or b""
                log.open("a").write(said.decode(errors="replace") if isinstance(said, bytes) else said)
                self.say(f"- {name}: stopped, the time was up")
                return None
        said = done.stdout
        log.open("a").write(said)
        if done.returncode:
            self.bad = True
            complaint = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            self.say(f"- **{name}: failed**, exit status {done.returncode}: {' / '.join(complaint[-3:])}")
            return None
        return said


def graphs_name(graphs: bool) -> str:
    return "graphs" if graphs else "plain"


def tests(session: Session, programs: Path, device: int):
    for graphs in [False, True]:
        for name, filters in TESTS.items():
            start = elapsed()
            said = session.run(f"tests {name} {graphs_name(graphs)}", [programs / name, *filters], graphs, RANKGRAD_TEST_GPU=str(device))
            if said is not None:
                result = re.search(r"\d+ passed; \d+ failed", said)
                session.say(f"- tests {name}, {graphs_name(graphs)}: {result[0] if result else said[-80:]}, {elapsed() - start:.0f} s")


def steps(session: Session, programs: Path, args):
    """Milliseconds of a step, both ways in turn, twice; and what the kernels took of it."""
    session.say("")
    session.say("| case | precision | ms a step | with graphs | speed with graphs | tokens/s, the better | kernels take, ms |")
    session.say("|---|---|---|---|---|---|---|")
    for case, flags in ({"as given": args.sizes} if args.sizes else CASES).items():
        for precision in ["f32", "bf16"]:
            line = [programs / "rankgrad", "bench", *flags.split(), "--device", f"cuda:{args.device}", "--precision", precision,
                    "--steps", str(args.steps), "--json"]
            seen = {False: [], True: []}
            for _ in range(2):
                for graphs in seen:
                    said = session.run(f"bench {case} {precision} {graphs_name(graphs)}", line, graphs)
                    if said:
                        seen[graphs].append(json.loads(said))
            profile = session.run(f"bench {case} {precision} kernels", [*line, "--profile"])
            ms = {graphs: statistics.median(s["step_ms"] for s in all) if all else float("nan") for graphs, all in seen.items()}
            tokens = max((s["tokens_per_second"] for all in seen.values() for s in all), default=float("nan"))
            kernels = sum(k["ms"] for k in json.loads(profile)["kernels"]) / args.steps if profile else float("nan")
            session.say(f"| {case} | {precision} | {ms[False]:.2f} | {ms[True]:.2f} | {ms[False] / ms[True]:.2f} | {tokens:,.0f} | {kernels:.2f} |")


def trainings(session: Session, programs: Path, args):
    """The program's default training: its validation loss each way."""
    session.say("")
    ways = [("f32", f"--device cuda:{args.device}", False), ("f32", f"--device cuda:{args.device}", True),
            ("bf16", f"--device cuda:{args.device}", False)]
    if args.two:
        ways.append(("f32", "--devices 0,1", False))
    ways.append(("f32", "--device cpu", False))
    losses = {}
    for precision, where, graphs in ways:
        name = f"train {precision} {where} {graphs_name(graphs)}"
        out = args.out / re.sub(r"\W+", "-", name)
        shutil.rmtree(out, ignore_errors=True)
        data = ["--data", args.data] if args.data else []
        line = [programs / "rankgrad", "train", "--quiet", *where.split(), "--precision", precision, "--out", out, "--steps", args.train_steps, *data,
                *args.sizes.split()]
        if session.run(name, line, graphs) is None:
            continue
        final = json.loads((out / "final.json").read_text())
        losses[precision, where, graphs] = final["val_loss"]
        session.say(f"- {name}: validation loss {final['val_loss']:.6f}, {final['seconds']:.1f} s, {final['tokens_per_second']:,.0f} tokens/s")
    one = losses.get(("f32", f"--device cuda:{args.device}", False))
    for (precision, where, graphs), loss in losses.items():
        allowed = 0.0 if graphs else 0.01  # the same kernels in the same order; other roundings
        if one is not None and precision == "f32" and abs(loss - one) > allowed:
            session.bad = True
            session.say(f"- **{where} {graphs_name(graphs)} ends {loss - one:+.6f} beside** one GPU: at most {allowed} is allowed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("on-gpu"))
    parser.add_argument("--budget", type=float, default=900)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--programs", type=Path)
    parser.add_argument("--data", type=Path, help="text to train on [default: the program's own]")
    parser.add_argument("--steps", type=int, default=20, help="of each measurement of a step")
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--sizes", default="", help="instead of the presets: flags of a model's shape")
    args = parser.parse_args()
    args.out, args.data = args.out.resolve(), args.data and args.data.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.programs:
        programs = args.programs.resolve()
    else:
        programs = args.out / "programs"
        compile_all(programs)
    session = Session(args)
    found = session.run("devices", [programs / "rankgrad", "devices"])
    if not found or f"cuda:{args.device}: " not in found:
        sys.exit(f"on_gpu: there is no cuda:{args.device} here\n{found or ''}")
    args.two = "cuda:1: " in found
    for line in found.splitlines():
        session.say(f"- {line}")
    if shutil.which("nvidia-smi"):
        driver = session.run("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        session.say(f"- driver {(driver or '?').split()[0]}")
    if not args.skip_tests:
        tests(session, programs, args.device)
    steps(session, programs, args)
    trainings(session, programs, args)
    if shutil.which("compute-sanitizer"):
        said = session.run("racecheck", ["compute-sanitizer", "--tool", "racecheck", programs / "gpu", "attention"], RANKGRAD_TEST_GPU=str(args.device))
        if said:
            session.say(f"- racecheck: {said.strip().splitlines()[-1]}")
    session.say(f"\n{elapsed() - session.began:.0f} s in all")
    sys.exit(1 if session.bad else 0)


if __name__ == "__main__":
    main()
