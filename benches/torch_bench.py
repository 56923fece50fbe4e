"""Times one training step of the decoder in PyTorch on the CPU, float32: forward, backward, clip and optimizer.

The counterpart of `rankgrad bench`; with --part optimizer or products, that of benches/parts.rs, which defines both parts.
compare.py runs each beside its counterpart. Not a training run: one random batch, again and again.
Install: python -m venv .venv && .venv/bin/pip install torch==2.15.0 numpy
On Linux x86-64 that is the CUDA build, about 3 GB, which runs without a GPU. A smaller set that suffices here:
    pip install --no-deps torch==2.15.0
    pip install numpy filelock typing-extensions setuptools sympy networkx jinja2 fsspec \
        "cuda-toolkit[cublas,cudart,cufft,cufile,cupti,cusparse,nvjitlink,nvrtc]==13.2.2" nvidia-cudnn-cu13==9.26.0.51 \
        nvidia-cusparselt-cu13==0.8.1 nvidia-nccl-cu13==2.30.7 nvidia-nvshmem-cu13==3.7.2
Run:     python torch_bench.py --preset tiny --method spectron --threads 2 [--json] [--compile]
"""

import argparse
import json
import resource
import statistics
import sys
from time import perf_counter

import torch

from torch_model import Decoder, Dense, Sizes, clip_gradients, optimizers

PRESETS = {  # batch, and the sizes of the model
    "tiny": (12, dict(vocab=256, dim=128, layers=4, heads=4, kv_heads=4, ffn=352, context=64)),
    "small": (8, dict(vocab=256, dim=384, layers=6, heads=6, kv_heads=6, ffn=1024, context=256)),
    "mid": (2, dict(vocab=4096, dim=768, layers=12, heads=12, kv_heads=12, ffn=2048, context=512)),
}


def peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def decoder(args) -> tuple:
    batch, sizes = PRESETS[args.preset]
    torch.manual_seed(1)
    return batch, sizes, Decoder(Sizes(**sizes, ratio=None if args.method.startswith("dense") else args.ratio))


def run_for(args, f) -> list:
    """What `f` returns, call by call, for as long as is asked."""
    for _ in range(args.warmup):
        f()
    results = []
    start = perf_counter()
    while len(results) < args.steps or perf_counter() - start < args.seconds:
        results.append(f())
    return results


def median_ms(args, f) -> tuple[float, int]:
    def timed():
        start = perf_counter()
        f()
        return perf_counter() - start

    times = run_for(args, timed)
    return 1e3 * statistics.median(times), len(times)


def measure_optimizer(args) -> dict:
    """The step of Spectron, or of Muon, alone: the blocks' matrices."""
    _, _, model = decoder(args)
    moved = optimizers(model, args.method, lr=1e-3, adam_lr=0.0, weight_decay=0.0)[0]
    for p in model.parameters():
        p.grad = 0.05 * torch.randn_like(p)
    ms, steps = median_ms(args, torch.compile(moved.step) if args.compile else moved.step)
    return {"step_ms": ms, "steps": steps}


@torch.no_grad()
def measure_products(args) -> dict:
    """The products of forward and backward but attention's, `rows` rows of x at a time, on operands as in the step."""
    batch, sizes, model = decoder(args)
    tokens = batch * sizes["context"]
    rows = args.rows or tokens
    calls = []  # (left, right, out, added to)
    flops = 0

    def call(a, b, out, add=False):
        nonlocal flops
        flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return a, b, out, add

    def layer(linear, x, dx, add):
        if isinstance(linear, Dense):
            w, dw = linear.W, torch.zeros_like(linear.W)  # [out, in]
            y, dy = torch.randn(rows, w.shape[0]), torch.randn(rows, w.shape[0])  # [N, out]
            return [call(x, w.T, y)], [call(dy, w, dx, add), call(dy.T, x, dw, True)]
        a, b = linear.A, linear.B  # [out, r], [in, r]
        y, dy = torch.randn(rows, a.shape[0]), torch.randn(rows, a.shape[0])  # [N, out]
        h, dh = torch.randn(rows, a.shape[1]), torch.randn(rows, a.shape[1])  # [N, r]
        backward = [call(dy, a, dh), call(dy.T, h, torch.zeros_like(a), True),
                    call(x.T, dh, torch.zeros_like(b), True), call(dh, b.T, dx, add)]
        return [call(x, b, h), call(h, a.T, y)], backward

    groups = [g for k in model.blocks for g in ([k.q, k.k, k.v], [k.o], [k.gate, k.up], [k.down])] + [[model.head]]
    backwards = []
    for group in groups:
        first = group[0]
        inputs = first.W.shape[1] if isinstance(first, Dense) else first.B.shape[0]
        x, dx = torch.randn(rows, inputs), torch.randn(rows, inputs)  # [N, in]
        pairs = [layer(linear, x, dx, i > 0) for i, linear in enumerate(group)]
        calls += [c for forward, _ in pairs for c in forward]
        backwards.append([c for _, backward in pairs for c in backward])
    calls += [c for backward in reversed(backwards) for c in backward]
    pieces = tokens // rows

    def all_products():
        for _ in range(pieces):
            for a, b, out, add in calls:
                if add:
                    out.addmm_(a, b)
                else:
                    torch.mm(a, b, out=out)

    ms, runs = median_ms(args, all_products)
    flops *= pieces
    return {"rows": rows, "runs": runs, "flops": flops, "products_ms": ms, "gflops": flops / ms / 1e6}


def measure_step(args) -> dict:
    library_mib = peak_memory_mib()  # what importing PyTorch alone takes
    batch, sizes, model = decoder(args)
    parameters = list(model.parameters())
    opts = optimizers(model, args.method, lr=0.01, adam_lr=1e-3, weight_decay=0.0)
    loss_of = torch.compile(model) if args.compile else model
    tokens = torch.randint(sizes["vocab"], (batch, sizes["context"] + 1))  # [B, T + 1]
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # [B, T] each

    def step():
        t0 = perf_counter()
        loss = loss_of(inputs, targets)  # []
        t1 = perf_counter()
        loss.backward()
        t2 = perf_counter()
        clip_gradients(parameters, 1.0)
        for o in opts:
            o.step()
        for o in opts:
            o.zero_grad()
        t3 = perf_counter()
        return t1 - t0, t2 - t1, t3 - t2, t3 - t0

    times = run_for(args, step)
    forward, backward, optimizer, whole = (1e3 * statistics.median(t) for t in zip(*times))
    return {
        "steps": len(times),
        "parameters": sum(p.numel() for p in parameters),
        "forward_ms": forward,
        "backward_ms": backward,
        "optimizer_ms": optimizer,  # with clipping and the release of the gradients
        "step_ms": whole,
        "tokens_per_second": 1e3 * tokens[:, 1:].numel() / whole,
        "peak_memory_mib": peak_memory_mib(),
        "library_memory_mib": library_mib,
    }


PARTS = {"step": measure_step, "optimizer": measure_optimizer, "products": measure_products}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, default="step")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--method", choices=["spectron", "adamw", "dense-adamw", "dense-muon"], default="spectron")
    parser.add_argument("--ratio", type=float, default=0.25, help="rank of a pair as a part of min(in, out)")
    parser.add_argument("--rows", type=int, help="products: of x at a time (default: the whole batch)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps (compilation happens in the first)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, at least")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure, at least")
    parser.add_argument("--compile", action="store_true", help="torch.compile the timed function, of a step forward and backward (needs a C++ compiler)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "part": args.part, "preset": args.preset, "method": args.method, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "compiled": args.compile, **PARTS[args.part](args),
    }
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:20} {value:,.2f}" if isinstance(value, float) else f"{key:20} {value}")


if __name__ == "__main__":
    main()
