"""Ten optimizer steps of a small model in float64, written to tests/data/reference_steps.json for the Rust tests.

Parameters and tokens come from an integer hash, so that another implementation can make the same ones without a file.
Not needed to build or test the library (the JSON is checked in); run it only when the definition changes.
Install: python -m venv .venv && .venv/bin/pip install torch==2.15.0 numpy
Run:     python reference_steps.py [--out FILE] [--float32]
p index of a tensor in parameters(), i index of an element in row-major order, s step, B, T, V as in torch_model.py.
"""

import argparse
import json
from pathlib import Path

import torch

from torch_model import Decoder, Sizes, clip_gradients, optimizers

V, B, T, STEPS = 61, 4, 16, 10
METHODS = {
    "spectron": {"lr": 0.02, "adam_lr": 4e-3},
    "adamw": {"lr": 3e-3, "adam_lr": 3e-3},
    "dense-adamw": {"lr": 2e-3, "adam_lr": 2e-3},
    "dense-muon": {"lr": 0.02, "adam_lr": 4e-3},
}


def noise(i: int, p: int) -> float:
    """Uniform in [−1, 1) on a grid of 2⁻²³, exact in float32."""
    mask = 0xFFFFFFFF
    h = (i * 2654435761 + (p + 1) * 2246822519) & mask
    h ^= h >> 15
    h = (h * 3266489917) & mask
    h ^= h >> 13
    return 2.0 * ((h >> 8) / 2**24) - 1.0


def scale(name: str) -> float:
    if name in ("embed.W", "head.W"):
        return {"embed.W": 0.5, "head.W": 0.2}[name]
    return {"A": 0.35, "B": 0.35, "W": 0.15, "gain": 0.1}[name.rsplit(".")[-1]]


def fill(model: Decoder):
    for p, (name, tensor) in enumerate(model.named_parameters()):
        centre = 1.0 if name.endswith(".gain") else 0.0
        values = [centre + scale(name) * noise(i, p) for i in range(tensor.numel())]
        # by way of f64, so that a float32 model starts from the rounded reference
        tensor.data.copy_(torch.tensor(values, dtype=torch.float64).view_as(tensor))


def batch(s: int):
    """Inputs and targets [B, T]: every other token is drawn, the one after it follows from it."""
    rows = []
    for b in range(B):
        row = []
        for t in range(T + 1):
            n = b * (T + 1) + t
            row.append(int((noise(n, 1000 + s) + 1.0) * 0.5 * V) if t % 2 == 0 else (row[-1] * 3 + 7) % V)
        rows.append(row)
    tokens = torch.tensor(rows)  # [B, T + 1]
    return tokens[:, :T], tokens[:, 1:]


def run(method: str, dtype: torch.dtype) -> dict:
    torch.set_default_dtype(dtype)
    ratio = None if method.startswith("dense") else 0.25
    model = Decoder(Sizes(vocab=V, dim=32, layers=2, heads=4, kv_heads=2, ffn=48, context=T, ratio=ratio))
    fill(model)
    first_u = {"start": lambda m: torch.tensor([noise(i, 0) for i in range(m)])} if method == "spectron" else {}
    opts = optimizers(model, method, weight_decay=0.1, **METHODS[method], **first_u)
    losses, norms = [], []
    for s in range(STEPS):
        loss = model(*batch(s))  # []
        for p in model.parameters():
            p.grad = None
        loss.backward()
        norms.append(clip_gradients(list(model.parameters()), 1.0).item())
        for o in opts:
            o.step()
        losses.append(loss.item())
    return {
        **METHODS[method],
        "losses": losses,
        "grad_norms": norms,
        "parameters": [
            {"name": name, "shape": list(p.shape), "sum": p.sum().item(), "sum_of_squares": p.square().sum().item()}
            for name, p in model.named_parameters()
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = Path(__file__).resolve().parent.parent / "tests" / "data"
    parser.add_argument("--out", type=Path, default=data / "reference_steps.json")
    parser.add_argument("--float32", action="store_true", help="also print how far a float32 run drifts; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation

    methods = {m: run(m, torch.float64) for m in METHODS}
    for m, r in methods.items():
        print(m, " ".join(f"{x:.6f}" for x in r["losses"]))
    if args.float32:
        for m, r in methods.items():
            drift = [abs(x / y - 1.0) for x, y in zip(run(m, torch.float32)["losses"], r["losses"])]
            print(f"{m}: largest relative difference of a float32 loss {max(drift):.2e}")
        return
    note = "Written by benches/reference_steps.py: losses and gradient norms (before clipping) of ten steps in float64."
    model = {"vocab": V, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "context": T, "batch": B,
             "ratio": 0.25, "rms_norm_eps": 1e-5, "rope_base": 10000.0}
    adam = {"betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
    out = {"note": note, "torch": torch.__version__, "model": model, "optimizer": adam, "methods": methods}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=1) + "\n")  # shortest digits that read back to the same f64, at most 17


if __name__ == "__main__":
    main()
