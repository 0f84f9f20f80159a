"""What is measured: cases, and the suites that group them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class Case:
    """One problem; (B, N, H, D) bf16 with 32 heads of 128, Lightning Attention's slopes, unless said otherwise."""

    batch: int
    tokens: int
    heads: int = 32
    dk: int = 128
    dv: int = 128
    dtype: str = "bf16"
    decay: str = "slopes"  # or "none", or "token": one a head and token, as Mamba-2's dt A
    passes: tuple[str, ...] = ("forward", "forward + backward")
    graph: bool = False  # replayed from a CUDA graph
    switches: bool = False  # also with the `precision` that the dtype can be asked for
    groups: int | None = None  # heads of q and k, fewer than v's, as in Mamba-2, and then the scale is 1
    kv_heads: int | None = None  # heads of k and v, fewer than q's
    layout: str = "tokens first"  # or "heads first", or "fused": views of one projection, (B, N, 3, H, D)
    documents: int = 0  # packed into the sequence, of random lengths
    learnt: bool = False  # the decays want a gradient
    states: bool = False  # an initial state is given, the final one returned
    compiled: bool = False  # called through torch.compile
    options: tuple[tuple[str, str | int], ...] = ()  # further arguments of linear_attention

    @property
    def special(self) -> set[str]:
        """What not every contestant has."""
        names = ("kv_heads", "documents", "learnt", "states", "compiled", "options")
        return {name for name in names if getattr(self, name)}

    @property
    def name(self) -> str:
        parts = [f"{self.batch} x {self.tokens:,}"]
        if self.heads != 32:
            parts.append(f"H={self.heads}")
        if self.dk != 128 or self.dv != 128:
            parts.append(f"D={self.dk}" if self.dk == self.dv else f"Dk={self.dk} Dv={self.dv}")
        if self.groups is not None:
            parts.append(f"G={self.groups}")
        if self.kv_heads is not None:
            parts.append(f"k, v {self.kv_heads} heads")
        if self.dtype != "bf16":
            parts.append(self.dtype)
        if self.decay != "slopes":
            parts.append({"none": "no decay", "token": "a decay a token"}[self.decay])
        if self.layout != "tokens first":
            parts.append({"fused": "views of one projection"}.get(self.layout, self.layout))
        if self.documents:
            parts.append(f"{self.documents:,} documents")
        parts += [word for word in ("learnt", "states", "compiled") if word in self.special]
        parts += [f"{name}={value}" for name, value in self.options]
        if self.graph:
            parts.append("CUDA graph")
        return " ".join(parts)

    @property
    def element(self) -> int:
        return DTYPES[self.dtype].itemsize

    def floor_bytes(self, which: str) -> int:
        """Bytes that must move: each input read once, each output written once."""
        if which == "step":
            return self.batch * self.heads * self.dk * self.dv * 4 * 2
        q, k, v, o, decay = self.tensors()
        if which == "forward":
            return q + k + v + o + decay
        return 3 * (q + k + v + decay) + 2 * o  # and q k v do dq dk dv, log_decay and its gradient; o not

    def output_bytes(self, which: str) -> int:
        """Of what a call returns."""
        q, k, v, o, decay = self.tensors()
        return {"forward": o, "forward + backward": q + k + v + o + decay}.get(which, 0)

    def input_bytes(self, which: str) -> int:
        """Of what a call is given: with backward, do as well."""
        q, k, v, o, decay = self.tensors()
        state = self.floor_bytes("step") // 2 if which == "step" else 0
        return q + k + v + decay + state + (o if which == "forward + backward" else 0)

    def tensors(self) -> tuple[int, int, int, int, int]:
        """Bytes of q, k, v, o, and of decays a token."""
        tokens = self.batch * self.tokens
        q, k, v = (tokens * heads * self.element for heads in self.head_counts())
        decay = tokens * self.heads * 4 * (self.decay == "token")
        return q * self.dk, k * self.dk, v * self.dv, tokens * self.heads * self.dv * self.element, decay

    def head_counts(self) -> tuple[int, int, int]:
        """Of q, k and v."""
        q = self.groups or self.heads
        return q, self.kv_heads or q, self.kv_heads or self.heads

    @property
    def scale(self) -> float:
        return float(self.dk**-0.5) if self.groups is None else 1.0

    def flops(self, which: str) -> int:
        """Of the recurrence, which no form undercuts: a state update and a product with it for each output."""
        products = {"step": 2, "forward": 2, "forward + backward": 6}[which]
        return products * 2 * self.batch * self.heads * self.tokens * self.dk * self.dv

    def log_decay(self, device: str) -> torch.Tensor:
        """(H,) natural logs; the slopes of Lightning Attention (and ALiBi), 2^(-8 h / H)."""
        if self.decay == "none":
            return torch.zeros(self.heads, device=device)
        heads = torch.arange(1, self.heads + 1, device=device, dtype=torch.float32)
        return -torch.exp2(-8 * heads / self.heads)


LONG = Case(1, 131072)
FORWARD = ("forward",)

SUITES: dict[str, tuple[str, list[Case]]] = {
    "lengths": (
        "bf16, 32 heads of 128, from 2,048 tokens to a million",
        [
            Case(1, 2048),
            Case(1, 2048, graph=True),
            Case(1, 8192),
            Case(1, 32768),
            LONG,
            Case(16, 8192),
            Case(1, 524288),
            Case(1, 1048576),
        ],
    ),
    "shapes": (
        "other heads, head sizes, dtypes and no decay, at 131,072 tokens",
        [
            replace(LONG, switches=True),
            replace(LONG, decay="none"),
            replace(LONG, dk=64, dv=64),
            replace(LONG, dk=256, dv=256),
            replace(LONG, dk=64, dv=128),
            replace(LONG, dk=128, dv=64),
            replace(LONG, heads=8),
            replace(LONG, heads=64),
            replace(LONG, dtype="fp16", switches=True),
        ],
    ),
    "fp32": (
        "fp32 inputs, where accuracy is the point",
        [
            Case(1, 8192, dtype="fp32"),
            Case(1, 131072, dtype="fp32", switches=True),
            Case(16, 8192, dtype="fp32"),
            Case(1, 131072, dk=64, dv=64, dtype="fp32"),
        ],
    ),
    "decode": (
        "one token with a state of (B, 32, 128, 128) fp32",
        [Case(batch, 1, passes=("step",), graph=graph) for graph in (True, False) for batch in (1, 32, 256)],
    ),
    "quick": (
        "two lengths, to see that everything works",
        [Case(1, 2048), Case(1, 32768)],
    ),
    "cpu": (
        "fp32 on the CPU, 4 heads of 64, beside the MiniMax layer of transformers and softmax attention",
        [Case(1, n, heads=4, dk=64, dv=64, dtype="fp32") for n in (512, 2048, 8192)],
    ),
}


def checked_rows(tokens: int) -> list[int]:
    """Tokens whose outputs are compared: both ends, and both sides of block boundaries."""
    wanted = {0, 1, 63, 64, 127, 128, tokens // 2 - 1, tokens // 2, tokens - 65, tokens - 1}
    wanted.add(int(tokens / math.pi))
    return sorted(row for row in wanted if 0 <= row < tokens)
