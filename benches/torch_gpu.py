"""A training step of the decoder in PyTorch on a GPU, in bf16, one way of it: eager or torch.compile; and what the machine can do.

compare_gpu.py starts it, several at a time, and talks to it by lines of JSON; see `main`. Not a training run: random tokens.
The decoder is that of torch_model.py, with these differences, all in favour of speed:
- autocast to bf16, and the residual stream, the rotary tables and the norms' results in bf16 too; weights, their gradients and the
  optimizer in f32;
- attention by the library's fused kernel that was the faster one on this GPU (flash or cuDNN);
- Newton–Schulz in bf16, as is usual for Muon (rankgrad's is in f32); fused AdamW;
- the tokens of a micro-batch go to the GPU from pinned memory while it computes, and the loss is read once per step.
Compiled is the model with its loss, by torch.compile's default mode; with --compile-optimizer the step of Spectron or Muon too.
B sequences, T tokens each, d width, H heads, hd = d/H, r rank, n matrices of one shape, N micro-batches of a step.
"""

import argparse
from contextlib import nullcontext
import json
import statistics
import subprocess
import sys
from time import perf_counter

import torch
import torch.nn.functional as F

import torch_model
from torch_model import Decoder, RmsNorm, Sizes, clip_gradients, optimizers

KERNELS = ("flash", "cudnn")  # attention's


# ---- the model

class NarrowNorm(RmsNorm):
    """Its result has the type of x: autocast would make it f32."""

    def forward(self, x):  # [B, T, d]
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.gain.shape, self.gain.to(x.dtype), eps=1e-5)  # [B, T, d]


class NarrowDecoder(Decoder):
    """For autocast: what flows between the layers is bf16."""

    def __init__(self, s: Sizes):
        super().__init__(s)
        for block in self.blocks:
            block.norm1, block.norm2 = NarrowNorm(s.dim), NarrowNorm(s.dim)
        self.norm = NarrowNorm(s.dim)
        self.cos, self.sin = self.cos.bfloat16(), self.sin.bfloat16()  # [T, 1, hd/2] each

    def forward(self, tokens, targets):  # [B, T] each
        x = F.embedding(tokens, self.embed.W).bfloat16()  # [B, T, d]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)  # [B, T, d]
        logits = self.head(self.norm(x))  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # []


def in_bf16(newton_schulz):
    return lambda m: newton_schulz(m.bfloat16()).to(m.dtype)  # [n, m, r]


def use_attention(kernel: str):
    """That one of the fused kernels, and where it cannot, whatever else there is."""
    torch.backends.cuda.enable_flash_sdp(kernel == "flash")
    torch.backends.cuda.enable_cudnn_sdp(kernel == "cudnn")


# ---- time

class Clock:
    """Marks in the order of the device's work; their distances are known once it is done. On a processor its own time."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def mark(self):
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start, end) -> float:
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()


# ---- one way of a step

class Way:
    def __init__(self, args):
        torch.manual_seed(1)
        self.args, self.clock = args, Clock(args.device)
        narrow = args.precision == "bf16"
        ratio = None if args.method.startswith("dense") else args.ratio
        sizes = Sizes(args.vocab, args.dim, args.layers, args.heads, args.heads, args.ffn, args.context, ratio)
        with torch.device(args.device):
            self.model = (NarrowDecoder if narrow else Decoder)(sizes)
            if narrow:
                torch_model.newton_schulz = in_bf16(torch_model.newton_schulz)  # what its optimizers call
            self.optimizers = optimizers(self.model, args.method, lr=1e-4, adam_lr=1e-5, weight_decay=0.0)
        self.autocast = lambda: torch.autocast(args.device, torch.bfloat16) if narrow else nullcontext()
        self.parameters = list(self.model.parameters())
        compiled = args.way == "compiled"
        self.loss = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.updates = [o.step for o in self.optimizers]
        if args.compile_optimizer and compiled and args.method != "dense-adamw":
            self.updates[0] = torch.compile(self.updates[0], dynamic=False)
        self.batches = []  # (inputs, targets), [B, T] each, N times
        for _ in range(args.accumulate):
            tokens = torch.randint(args.vocab, (2, args.batch, args.context))  # [2, B, T]
            self.batches.append(tokens.pin_memory() if args.device == "cuda" else tokens)

    def step(self) -> dict:
        start, begin = perf_counter(), self.clock.mark()
        total = 0.0
        for tokens in self.batches:
            inputs, targets = tokens.to(self.args.device, non_blocking=True)  # [B, T] each
            with self.autocast():
                loss = self.loss(inputs, targets) / len(self.batches)  # []
            loss.backward()
            total = total + loss.detach()  # []
        middle = self.clock.mark()
        clip_gradients(self.parameters, 1.0)
        for update in self.updates:
            update()
        for o in self.optimizers:
            o.zero_grad()
        end = self.clock.mark()
        total = total.item()
        self.clock.wait()
        whole = 1e3 * (perf_counter() - start)
        return {"step_ms": whole, "forward_backward_ms": self.clock.ms(begin, middle),
                "optimizer_ms": self.clock.ms(middle, end), "loss": total}

    def prepare(self) -> dict:
        """Compiles, and takes what memory that needs; gives it back."""
        start = perf_counter()
        loss = [self.step()["loss"] for _ in range(2)]
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
        return {"prepared": True, "prepare_seconds": perf_counter() - start, "losses": loss}

    def measure(self, untimed: int, steps: int) -> dict:
        for _ in range(untimed):
            self.step()
        cuda = self.args.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        taken = [self.step() for _ in range(steps)]
        medians = {k: statistics.median(s[k] for s in taken) for k in taken[0]}
        memory = {"device_memory_mib": torch.cuda.max_memory_allocated() / 2**20,
                  "device_memory_reserved_mib": torch.cuda.max_memory_reserved() / 2**20} if cuda else {}
        tokens = self.args.accumulate * self.args.batch * self.args.context
        return {"steps": steps, "tokens_per_step": tokens, **medians, "tokens_per_second": 1e3 * tokens / medians["step_ms"],
                "params": sum(p.numel() for p in self.parameters), **memory}


# ---- what the machine can do

def repeat_ms(clock: Clock, f, times: int = 10) -> float:
    """The median, after two untimed."""
    marks = []
    for _ in range(times + 2):
        start = clock.mark()
        f()
        marks.append((start, clock.mark()))
    clock.wait()
    return statistics.median(clock.ms(a, b) for a, b in marks[2:])


def attention_ms(args, clock: Clock, context: int) -> dict:
    """Forward and backward of one layer's attention in bf16, by kernel; what fails has its complaint."""
    heads, tokens, times = args.heads, args.batch * args.context, {}
    shape = (max(tokens // context, 1), context, heads, args.dim // heads)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=args.device).transpose(1, 2).requires_grad_() for _ in range(3))

    def both():  # q, k, v [B, H, T, hd]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, hd]
        torch.autograd.grad(y, (q, k, v), y)

    for kernel in KERNELS:
        torch.backends.cuda.enable_math_sdp(False)  # so that what cannot run fails
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        use_attention(kernel)
        try:
            times[kernel] = repeat_ms(clock, both, 5)
        except RuntimeError as error:
            times[kernel] = str(error).splitlines()[0]
    return times


def machine(args) -> dict:
    """Names, versions, the rate of a large copy (bytes read and written) and of a large bf16 product."""
    cuda, clock = args.device == "cuda", Clock(args.device)
    about = {"torch": torch.__version__, "python": sys.version.split()[0], "device": args.device}
    try:
        import triton
        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = None
    if cuda:
        p = torch.cuda.get_device_properties(0)
        about |= {"gpu": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
                  "memory_gib": p.total_memory / 2**30, "free_gib": torch.cuda.mem_get_info()[0] / 2**30,
                  "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        fields = ["driver_version", "clocks.max.sm", "power.limit"]
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
            about |= zip(fields, (field.strip() for field in told.split(",")))
        except (OSError, subprocess.TimeoutExpired) as error:
            about["driver_version"] = f"unknown: {error}"
        try:
            about["sdp_priority_order"] = str(torch._C._get_sdp_priority_order())
        except AttributeError:
            about["sdp_priority_order"] = "this PyTorch does not tell"
    size = 2**30 if cuda else 2**22
    source, target = torch.ones(size, device=args.device), torch.empty(size, device=args.device)  # [size] each
    ms = repeat_ms(clock, lambda: target.copy_(source))
    about["copy_tb_per_s"] = 8 * size / ms / 1e9
    del source, target
    n = 8192 if cuda else 256
    a, b = (torch.randn(n, n, device=args.device).bfloat16() for _ in range(2))  # [n, n] each
    c = torch.empty_like(a)  # [n, n]
    ms = repeat_ms(clock, lambda: torch.mm(a, b, out=c))
    about["product_tflops"] = 2 * n**3 / ms / 1e9
    if cuda:
        about["attention_ms"] = {str(t): attention_ms(args, clock, t) for t in args.contexts}
    return about


# ---- talking

def main():
    """--machine: one object when PyTorch is there, one of what was found. Otherwise one when the model is there, and then one for each line of stdin, {"do": "prepare", "attention":
    KERNEL} or {"do": "measure", "untimed": n, "steps": n}."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", action="store_true")
    parser.add_argument("--way", choices=["eager", "compiled"], default="eager")
    parser.add_argument("--method", choices=["spectron", "dense-muon", "dense-adamw"], default="spectron")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--ratio", type=float, default=0.25, help="rank of a pair as a part of min(in, out)")
    parser.add_argument("--compile-optimizer", action="store_true")
    parser.add_argument("--contexts", type=int, nargs="+", default=[], help="of --machine")
    for size in ("vocab", "dim", "layers", "heads", "ffn", "context", "batch", "accumulate"):
        parser.add_argument(f"--{size}", type=int, required=True)
    args = parser.parse_args()

    def say(reply: dict):
        print(json.dumps(reply), flush=True)

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} finds no NVIDIA GPU here")
    # what autocast leaves in f32 (here the power iteration) may take TF32, as is usual
    torch.set_float32_matmul_precision("high" if args.precision == "bf16" else "highest")
    if args.machine:
        say({"imported": True})
        return say(machine(args))
    way = Way(args)
    say({"loaded": True})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "prepare":
            use_attention(command["attention"])
            say(way.prepare())
        else:
            say(way.measure(command["untimed"], command["steps"]))


if __name__ == "__main__":
    main()
