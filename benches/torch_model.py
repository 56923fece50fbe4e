"""The PyTorch measuring stick: the Llama-style decoder of this project, Spectron and Muon, as a seasoned PyTorch user writes them.

One definition for every script here: in float64 it gives the reference losses, in float32 it is what we time.
Not a part of the library, which neither needs nor imports Python; not a guard against zero-initialised factors.
B sequences, T tokens each, V vocabulary, d width, H heads, K key/value heads, hd = d/H, F ffn width,
r rank of a pair W = A Bᵀ (A [out, r], B [in, r]), n factors of one shape [m, r], σ spectral norm, η learning rate.
"""

from dataclasses import dataclass
import math

import torch
from torch import nn
import torch.nn.functional as F

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steep at 0, not convergent, into [0.68, 1.20]


@dataclass(frozen=True)
class Sizes:
    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    ratio: float | None  # rank / min(in, out); None = dense matrices


class Pair(nn.Module):
    """x Wᵀ with W = A Bᵀ, which is never formed."""

    def __init__(self, inputs: int, outputs: int, ratio: float):
        super().__init__()
        rank = max(1, int(ratio * min(inputs, outputs)))
        std = math.sqrt(0.02 / math.sqrt(rank))  # so that the entries of A Bᵀ have standard deviation 0.02
        self.A = nn.Parameter(std * torch.randn(outputs, rank))  # [out, r]
        self.B = nn.Parameter(std * torch.randn(inputs, rank))  # [in, r]

    def forward(self, x):  # [B, T, in]
        return F.linear(x @ self.B, self.A)  # [B, T, out]


class Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.W = nn.Parameter(0.02 * torch.randn(outputs, inputs))  # [out, in]

    def forward(self, x):  # [B, T, in]
        return F.linear(x, self.W)  # [B, T, out]


class RmsNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))  # [d]

    def forward(self, x):  # [B, T, d]
        return F.rms_norm(x, self.gain.shape, self.gain, eps=1e-5)  # [B, T, d]


def rotate(x, cos, sin):
    """Rotary positions, "rotate half": coordinate i turns with i + hd/2. x [B, T, H, hd]; cos, sin [T, 1, hd/2]."""
    a, b = x.chunk(2, dim=-1)  # [B, T, H, hd/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # [B, T, H, hd]


class Block(nn.Module):
    # The order of registration is the order of parameters(), on which the reference values depend.
    def __init__(self, s: Sizes):
        super().__init__()
        kv = s.kv_heads * (s.dim // s.heads)
        self.heads, self.kv_heads = s.heads, s.kv_heads

        def linear(inputs, outputs):
            return Dense(inputs, outputs) if s.ratio is None else Pair(inputs, outputs, s.ratio)

        self.norm1 = RmsNorm(s.dim)
        self.q = linear(s.dim, s.dim)
        self.k = linear(s.dim, kv)
        self.v = linear(s.dim, kv)
        self.o = linear(s.dim, s.dim)
        self.norm2 = RmsNorm(s.dim)
        self.gate = linear(s.dim, s.ffn)
        self.up = linear(s.dim, s.ffn)
        self.down = linear(s.ffn, s.dim)

    def forward(self, x, cos, sin):  # [B, T, d]
        h = self.norm1(x)  # [B, T, d]
        q = rotate(self.q(h).unflatten(-1, (self.heads, -1)), cos, sin)  # [B, T, H, hd]
        k = rotate(self.k(h).unflatten(-1, (self.kv_heads, -1)), cos, sin)  # [B, T, K, hd]
        v = self.v(h).unflatten(-1, (self.kv_heads, -1))  # [B, T, K, hd]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            is_causal=True, enable_gqa=self.kv_heads != self.heads,
        )  # [B, H, T, hd]
        x = x + self.o(y.transpose(1, 2).flatten(-2))  # [B, T, d]
        h = self.norm2(x)  # [B, T, d]
        return x + self.down(F.silu(self.gate(h)) * self.up(h))  # [B, T, d]


class Decoder(nn.Module):
    # Every parameter sits in a submodule: parameters() lists a module's own ones before those of its submodules.
    def __init__(self, s: Sizes):
        super().__init__()
        half = s.dim // s.heads // 2
        self.embed = Dense(s.dim, s.vocab)  # W [V, d], used as a table
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = RmsNorm(s.dim)
        self.head = Dense(s.dim, s.vocab)  # W [V, d]
        # The angles are taken in f64 whatever the model computes in: in f32 pos·base^(−i/half) loses digits.
        pos = torch.arange(s.context, dtype=torch.float64)  # [T]
        angle = torch.outer(pos, 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half))  # [T, hd/2]
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", angle.cos().to(dtype).unsqueeze(1), persistent=False)  # [T, 1, hd/2]
        self.register_buffer("sin", angle.sin().to(dtype).unsqueeze(1), persistent=False)  # [T, 1, hd/2]

    def forward(self, tokens, targets):  # [B, T] each
        x = F.embedding(tokens, self.embed.W)  # [B, T, d]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)  # [B, T, d]
        logits = self.head(self.norm(x))  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # []

    def pairs(self) -> list[Pair]:
        return [m for m in self.modules() if isinstance(m, Pair)]


def newton_schulz(m, iterations: int = 5):
    """Nearest orthonormal columns, roughly, of each tall matrix of a batch [n, m, r]; 0 stays 0."""
    a, b, c = NEWTON_SCHULZ
    norm = torch.linalg.vector_norm(m, dim=(1, 2), keepdim=True)  # [n, 1, 1]
    x = m / norm.clamp_min(torch.finfo(m.dtype).tiny)  # [n, m, r]
    for _ in range(iterations):
        g = torch.bmm(x.mT, x)  # [n, r, r]
        p = torch.baddbmm(g, g, g, beta=b, alpha=c)  # [n, r, r]  b G + c G²
        x = torch.baddbmm(x, x, p, beta=a)  # [n, m, r]  a X + X (b G + c G²)
    return x


def power_iteration(w, u):
    """Estimates σ of each matrix of a batch w [n, m, r] from below; u [n, 1, m] is the last left vector.

    Vectors are rows: on the CPU a batch of row · matrix runs up to 20 times faster than one of matrix · column.
    """
    v = F.normalize(torch.bmm(u, w), dim=2)  # [n, 1, r]
    u = F.normalize(torch.bmm(v, w.mT), dim=2)  # [n, 1, m]
    sigma = torch.linalg.vector_norm(torch.bmm(u, w), dim=(1, 2))  # [n]  uᵀ W v for v = Wᵀu / ‖Wᵀu‖
    return sigma, u


def stacks(tensors: list) -> dict:
    """Makes the tensors views of one buffer per shape; returns the shape's indices and its buffer [n, m, r], by shape."""
    found = {}
    for shape in sorted({t.shape for t in tensors}):
        ids = [i for i, t in enumerate(tensors) if t.shape == shape]
        stack = torch.stack([tensors[i].data for i in ids])  # [n, m, r]
        for view, i in zip(stack, ids):
            tensors[i].data = view
        found[shape] = (ids, stack)
    return found


class Spectron:
    """Spectron (Janson, Oyallon, Belilovsky; arXiv 2602.12429) on factor pairs, all factors of one shape at once.

    The parameters become views of one buffer per shape, so that nothing is gathered or scattered in a step.
    σ and ρ are those of the factors as the step finds them, before the decay. `start(m)` gives the first left vector [m].
    """

    def __init__(self, pairs: list[Pair], lr: float, weight_decay: float = 0.0, momentum: float = 0.95,
                 start=lambda m: torch.randn(m)):
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        factors = [f for p in pairs for f in (p.A, p.B)]  # factor 2i is A of pair i, 2i + 1 its B
        self.groups = []
        order = []
        for shape, (ids, stack) in stacks(factors).items():
            order += ids
            ema = torch.zeros_like(stack)  # [n, m, r]
            self.groups.append({
                "factors": [factors[i] for i in ids],
                "pair": torch.tensor([i // 2 for i in ids]),  # [n]
                "stack": stack,
                "ema": ema,
                "ema_views": list(ema),
                "u": start(shape[0]).to(stack.dtype).expand(len(ids), 1, -1),  # [n, 1, m]
            })
        self.unsort = torch.tensor(order).argsort()  # [2·pairs]  from the groups' order to that of `factors`

    @torch.no_grad()
    def step(self):
        sigmas = []
        for g in self.groups:
            sigma, g["u"] = power_iteration(g["stack"], g["u"])
            sigmas.append(sigma)
        sigma = torch.cat(sigmas)[self.unsort].view(-1, 2)  # [pairs, 2]
        rho = self.lr / (sigma.sum(dim=1) + 1.0)  # [pairs]
        for g in self.groups:
            torch._foreach_lerp_(g["ema_views"], [f.grad for f in g["factors"]], 1.0 - self.momentum)
            update = newton_schulz(g["ema"])  # [n, m, r]
            if self.weight_decay:  # both factors by √(1 − ηλ): W itself shrinks by 1 − ηλ
                g["stack"].mul_(math.sqrt(1.0 - self.lr * self.weight_decay))
            g["stack"].addcmul_(update, rho[g["pair"]].view(-1, 1, 1), value=-1.0)

    def zero_grad(self):
        for g in self.groups:
            for f in g["factors"]:
                f.grad = None


class Muon:
    """Muon (Jordan et al. 2024) on whole matrices, all of one shape at once; the update is scaled by √max(1, rows/cols)."""

    def __init__(self, matrices: list, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.groups = []
        for ids, stack in stacks(matrices).values():
            ema = torch.zeros_like(stack)  # [n, m, r]
            self.groups.append((stack, ema, list(ema), [matrices[i] for i in ids]))

    @torch.no_grad()
    def step(self):
        for stack, ema, views, matrices in self.groups:
            torch._foreach_lerp_(views, [w.grad for w in matrices], 1.0 - self.momentum)
            rows, cols = stack.shape[1:]
            update = newton_schulz(ema) if rows >= cols else newton_schulz(ema.mT).mT  # [n, m, r]
            if self.weight_decay:
                stack.mul_(1.0 - self.lr * self.weight_decay)
            stack.add_(update, alpha=-self.lr * math.sqrt(max(1.0, rows / cols)))

    def zero_grad(self):
        for _, _, _, matrices in self.groups:
            for w in matrices:
                w.grad = None


def adamw(parameters, lr: float, betas=(0.9, 0.99), weight_decay: float = 0.1):
    """AdamW that decays matrices and leaves gains alone."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def optimizers(model: Decoder, method: str, lr: float, adam_lr: float, weight_decay: float = 0.1, **spectron):
    """What trains the model: [Spectron for the pairs or Muon for the blocks' matrices, AdamW for the rest], or [AdamW]."""
    if method == "spectron":
        moved = [f for p in model.pairs() for f in (p.A, p.B)]
        special = Spectron(model.pairs(), lr, weight_decay, **spectron)
    elif method == "dense-muon":
        moved = [m.W for m in model.blocks.modules() if isinstance(m, Dense)]
        special = Muon(moved, lr, weight_decay)
    else:
        return [adamw(model.parameters(), adam_lr, weight_decay=weight_decay)]
    ids = {id(p) for p in moved}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [special, adamw(rest, adam_lr, weight_decay=weight_decay)]


@torch.no_grad()
def clip_gradients(parameters, limit: float):
    """Scales all gradients by min(1, limit/norm) and returns the norm before.

    `clip_grad_norm_` is not used: it divides by norm + 1e-6, which is visible in float64.
    """
    grads = [p.grad for p in parameters]
    norm = torch.nn.utils.get_total_norm(grads)  # []
    torch._foreach_mul_(grads, (limit / norm).clamp(max=1.0))
    return norm
