"""A yardstick of loss and time: the well-known CPU recipe of nanoGPT (a small GPT-2 on characters), written anew in PyTorch.

The model is GPT-2's shape: learned positions, LayerNorm, GELU, embedding and head tied; no biases, no dropout.
Not this project's model, which is in torch_model.py, and not tuned: it shows what the common starting point reaches.
Install: python -m venv .venv && .venv/bin/pip install torch==2.15.0 numpy
Run:     python nanogpt_baseline.py --data FILE [--vocabulary char|byte] [--threads 2] [--json]
B sequences, T tokens each, V vocabulary, d width, H heads, hd = d/H, L layers.
"""

import argparse
import json
import math
from pathlib import Path
import sys
from time import perf_counter

import torch
from torch import nn
import torch.nn.functional as F

from torch_model import adamw, clip_gradients

LAYERS, DIM, HEADS, CONTEXT, BATCH = 4, 128, 4, 64, 12
LR, MIN_LR, WARMUP = 1e-3, 1e-4, 100
EVAL_EVERY, EVAL_BATCHES = 250, 20


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, bias=False)
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.o = nn.Linear(DIM, DIM, bias=False)
        self.norm2 = nn.LayerNorm(DIM, bias=False)
        self.up = nn.Linear(DIM, 4 * DIM, bias=False)
        self.down = nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x):  # [B, T, d]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))  # [B, T, 3, H, hd]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, T, hd] each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, hd]
        x = x + self.o(y.transpose(1, 2).flatten(-2))  # [B, T, d]
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # [B, T, d]


class Gpt(nn.Module):
    def __init__(self, vocab: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, DIM)
        self.positions = nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(DIM, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # 2L branches add to the residual stream: their sum should start no larger than one of them
                residual = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens):  # [B, T]
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]  # [B, T, d]
        return F.linear(self.norm(self.blocks(x)), self.embed.weight)  # [B, T, V]

    def loss(self, tokens, targets, reduction="mean"):
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), reduction=reduction)


def read(path: Path, vocabulary: str):
    """Token ids of the file (first 90 %, last 10 %) and the number of different ids."""
    raw = path.read_bytes()
    text = raw.decode("utf-8") if vocabulary == "char" else raw
    ids = {c: i for i, c in enumerate(sorted(set(text)))} if vocabulary == "char" else range(256)
    data = torch.tensor([ids[c] for c in text])  # [length]
    cut = int(0.9 * len(data))
    return data[:cut], data[cut:], len(ids)


def draw(data, generator):
    """A random batch: inputs and targets [B, T]."""
    starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator)  # [B]
    tokens = data[starts[:, None] + torch.arange(CONTEXT + 1)]  # [B, T + 1]
    return tokens[:, :-1], tokens[:, 1:].contiguous()


@torch.no_grad()
def sampled_loss(model, data) -> float:
    generator = torch.Generator().manual_seed(1337)  # the same batches each time
    return sum(model.loss(*draw(data, generator)).item() for _ in range(EVAL_BATCHES)) / EVAL_BATCHES


@torch.no_grad()
def whole_loss(model, data) -> float:
    """Over consecutive windows of T tokens, the last one shorter: every token but the first is predicted once."""
    total = 0.0
    for start in range(0, len(data) - 1, BATCH * CONTEXT):
        part = data[start : start + BATCH * CONTEXT + 1]  # [at most B·T + 1]
        full = (len(part) - 1) // CONTEXT * CONTEXT
        for a, b in ((0, full), (full, len(part) - 1)):
            if a < b:
                width = min(CONTEXT, b - a)
                total += model.loss(part[a:b].view(-1, width), part[a + 1 : b + 1].view(-1, width), "sum").item()
    return total / (len(data) - 1)


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return MIN_LR + 0.5 * (1.0 + math.cos(math.pi * progress)) * (LR - MIN_LR)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--vocabulary", choices=["char", "byte"], default="char")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss; compiling counts as training")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, progress on stderr")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train, valid, vocab = read(args.data, args.vocabulary)
    model = Gpt(vocab)
    parameters = list(model.parameters())
    optimizer = adamw(parameters, LR)
    generator = torch.Generator().manual_seed(args.seed)
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    history, training = [], 0.0
    start = perf_counter()
    mark = start
    for step in range(args.steps + 1):
        if step % EVAL_EVERY == 0:
            training += perf_counter() - mark
            estimate = sampled_loss(model, valid)
            history.append({"step": step, "valid_loss": estimate, "training_seconds": training})
            print(f"step {step:5}  validation loss {estimate:.4f}  {training:7.1f} s of training",
                  file=sys.stderr if args.json else sys.stdout, flush=True)
            mark = perf_counter()
        if step == args.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        loss = loss_of(*draw(train, generator))  # []
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(parameters, 1.0)
        optimizer.step()
    training += perf_counter() - mark
    final = whole_loss(model, valid)
    result = {
        "final_valid_loss": final, "history": history, "training_seconds": training,
        "seconds": perf_counter() - start, "tokens_per_second": args.steps * BATCH * CONTEXT / training,
        "parameters": sum(p.numel() for p in parameters), "vocabulary": vocab,
        "validation_tokens": len(valid), "steps": args.steps, "threads": args.threads, "torch": torch.__version__,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"whole validation set {final:.4f}  training {training:.1f} s, with evaluation {result['seconds']:.1f} s")


if __name__ == "__main__":
    main()
