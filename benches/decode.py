"""Tokens per second of decoding: rankgrad against transformers on the CPU, the same exported model, one sequence at a time.

A model of the preset's sizes is trained for one step (weights do not change how long a token takes), exported to Hugging Face's
layout, and decoded by both in turn: half a context of prompt, then tokens, medians per token. transformers in float32, greedily, with
its key/value cache, by `generate` and by a loop over `forward`: the faster counts. "stock" is PyTorch as the wheel comes, "best" with
MKL's fast path opened as compare.py does it. Needs torch and transformers:
    python3 -m venv v; v/bin/pip install torch transformers      (the CPU wheels will do)
    cargo build --release; v/bin/python benches/decode.py [--preset small] [--rounds 3] [--threads 2]
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
from time import perf_counter

HERE = Path(__file__).resolve().parent
TOKENS = 64


def transformers_rate(folder: str, prompt: int, threads: int) -> None:
    """Prints {"generate": tokens/s, "forward": tokens/s}. In a process of its own."""
    import torch
    from transformers import LlamaForCausalLM
    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = (torch.arange(prompt) * 37 % 256)[None]  # [1, prompt]

    def generate(tokens: int) -> float:
        start = perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return perf_counter() - start

    def forward() -> float:
        seen = model(ids, use_cache=True)
        times = []
        for _ in range(TOKENS):
            start = perf_counter()
            next_id = seen.logits[:, -1].argmax(-1, keepdim=True)  # [1, 1]
            seen = model(next_id, past_key_values=seen.past_key_values, use_cache=True)
            times.append(perf_counter() - start)
        return statistics.median(times)

    with torch.no_grad():
        generate(4), forward()  # warm
        by_generate = TOKENS / (generate(TOKENS + 1) - generate(1))
        print(json.dumps({"generate": by_generate, "forward": 1 / forward()}))


def main() -> None:
    if sys.argv[1:2] == ["--transformers"]:
        return transformers_rate(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rankgrad", type=Path, default=HERE.parent / "target/release/rankgrad")
    args = parser.parse_args()
    rankgrad = str(args.rankgrad.resolve())
    with tempfile.TemporaryDirectory() as folder:
        run, model, shim = (f"{folder}/{name}" for name in ["run", "model", "intel.so"])
        # stopped before its end, where it would be validated at length
        train = [rankgrad, "train", "--preset", args.preset, "--steps", "2", "--stop-after", "1", "--quiet", "--out", run]
        subprocess.run(train, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        subprocess.run([rankgrad, "export", run, model], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-x", "c", "-o", shim, "-"], check=True, text=True,
                       input="int mkl_serv_intel_cpu_true(void) { return 1; }")
        context = json.loads(Path(model, "config.json").read_text())["max_position_embeddings"]

        def theirs(preload: str) -> float:
            command = [sys.executable, __file__, "--transformers", model, str(context // 2), str(args.threads)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "LD_PRELOAD": preload, "HF_HUB_OFFLINE": "1",
                           "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
            out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            return max(json.loads(out.splitlines()[-1]).values())

        def ours() -> dict:
            command = [rankgrad, "generate", run, "--bench", "--json", "--tokens", str(TOKENS), "--threads", str(args.threads)]
            rows = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)["rows"]
            return {row["weights"]: row["decode_tokens_per_second"] for row in rows}

        rounds = [(ours(), theirs(""), theirs(shim)) for _ in range(args.rounds)]
    print(f"{args.preset}, {args.threads} threads, {args.rounds} rounds; decoded tokens per second, median (min–max)")

    def show(name: str, values: list) -> None:
        print(f"{name:40}{statistics.median(values):10.1f} ({min(values):.1f}–{max(values):.1f})")

    kinds = list(rounds[0][0])
    for kind in kinds:
        show(f"rankgrad, {kind}", [r[0][kind] for r in rounds])
    show("transformers, stock", [r[1] for r in rounds])
    show("transformers, best", [r[2] for r in rounds])
    for kind in kinds:
        show(f"rankgrad {kind} / transformers stock", [r[0][kind] / r[1] for r in rounds])
        show(f"rankgrad {kind} / transformers best", [r[0][kind] / r[2] for r in rounds])
    if {"factored", "merged"} <= set(kinds):
        show("factored / merged", [r[0]["factored"] / r[0]["merged"] for r in rounds])


main()
