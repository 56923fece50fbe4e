"""Times one training step of the decoder in PyTorch on the CPU, float32: forward, backward, clip and optimizer.

The counterpart of `rankgrad bench`; compare.py runs both in turn. Not a training run: one random batch, again and again.
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

from torch_model import Decoder, Sizes, clip_gradients, optimizers

PRESETS = {  # batch, and the sizes of the model
    "tiny": (12, dict(vocab=256, dim=128, layers=4, heads=4, kv_heads=4, ffn=352, context=64)),
    "small": (8, dict(vocab=256, dim=384, layers=6, heads=6, kv_heads=6, ffn=1024, context=256)),
    "mid": (2, dict(vocab=4096, dim=768, layers=12, heads=12, kv_heads=12, ffn=2048, context=512)),
}


def peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(args) -> dict:
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    library_mib = peak_memory_mib()  # what importing PyTorch alone takes
    batch, sizes = PRESETS[args.preset]
    model = Decoder(Sizes(**sizes, ratio=None if args.method == "dense-adamw" else args.ratio))
    parameters = list(model.parameters())
    opts = optimizers(model, args.method, lr=0.01, adam_lr=1e-3)
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

    for _ in range(args.warmup):
        step()
    times = []
    start = perf_counter()
    while len(times) < args.steps or perf_counter() - start < args.seconds:
        times.append(step())
    forward, backward, optimizer, whole = (1e3 * statistics.median(t) for t in zip(*times))
    return {
        "preset": args.preset,
        "method": args.method,
        "threads": torch.get_num_threads(),
        "steps": len(times),
        "parameters": sum(p.numel() for p in parameters),
        "forward_ms": forward,
        "backward_ms": backward,
        "optimizer_ms": optimizer,  # with clipping and the release of the gradients
        "step_ms": whole,
        "tokens_per_second": 1e3 * tokens[:, 1:].numel() / whole,
        "peak_memory_mib": peak_memory_mib(),
        "library_memory_mib": library_mib,
        "torch": torch.__version__,
        "compiled": args.compile,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--method", choices=["spectron", "adamw", "dense-adamw"], default="spectron")
    parser.add_argument("--ratio", type=float, default=0.25, help="rank of a pair as a part of min(in, out)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps (compilation happens in the first)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, at least")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure, at least")
    parser.add_argument("--compile", action="store_true", help="torch.compile forward and backward (needs a C++ compiler)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    result = measure(args)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:20} {value:,.2f}" if isinstance(value, float) else f"{key:20} {value}")


if __name__ == "__main__":
    main()
