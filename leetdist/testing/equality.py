"""Is the sharded operator equal, bit for bit, to one device? The check behind `verify`, the demo and the tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from leetdist.api import linear_attention
from leetdist.sequence.grid import default_tile, shard_lengths
from leetdist.sequence.transport import Transport

DECAYS = {"slow": 0.9999, "fast": 0.1, "gone": 1e-30}
# Of a decay a token, in turn over tokens and heads: strong ones among weak, and the state started anew.
STEPS = {
    "tokens": (-1e-3, -0.3, -1e-5, -2.0, -1e-2, 0.0, -50.0),
    "restarts": (-0.1, -1e-3, -math.inf, -0.0, -1e-4, -110.0, -0.02, -1e-30, -1e30),
    "slow tokens": (-1e-4, -1e-6, -2e-4),
    "no steps": (0.0,),
}
EXTREMES = (-math.inf, -110.0, -1e-30, -1e30, -2.0, -0.0)


def lightning_slopes(heads: int) -> Tensor:
    """Log-decays of Lightning Attention, `-2^(-8 (h + 1) / H)` for head h: (H,) fp32.

    Source: TransNormerLLM, arXiv 2307.14995, section 3.2 (the slopes of ALiBi).
    """
    return -(2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float32, device="cpu") / heads))


@dataclass(frozen=True)
class Case:
    """One call to compare: shapes, dtype, decay and how the sequence is cut.

    decay is one of "none", "lightning", "mixed" (lightning with a head of no decay and one that forgets at once),
    "extreme" (log-decays from EXTREMES in turn), a key of DECAYS, or of STEPS: a decay a token. With `learnt`,
    log_decay needs a gradient. kv_heads: of k and v, and q_heads, v_heads: of one of q and v, where not `heads`.
    `uneven` gives ranks growing shares of the tiles, `shards` tokens by rank. Without `final` nobody asks for the final
    state, and what only that needs is left out.
    """

    tokens: int
    dk: int = 64
    dv: int = 64
    batch: int = 1
    heads: int = 4
    kv_heads: int | None = None
    q_heads: int | None = None
    v_heads: int | None = None
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    decay: str = "lightning"
    documents: tuple[int, ...] | None = None
    initial: bool = False
    final: bool = True
    learnt: bool = True
    uneven: bool = False
    tile: int | None = None
    method: str = "auto"
    model_layout: bool = False
    shards: tuple[int, ...] | None = None

    def __str__(self) -> str:
        heads = "/".join(map(str, dict.fromkeys((self.heads, *self.shared))))
        extras = [
            name
            for name, on in (
                (f"scale {self.scale}", self.scale != 1.0),
                ("packed", self.documents),
                ("initial state", self.initial),
                ("no final state", not self.final),
                ("uneven", self.uneven),
                (f"shards {self.shards}", self.shards),
                ("(B, N, H, D)", self.model_layout),
                (f"tile {self.tile}", self.tile),
                (self.method, self.method != "auto"),
            )
            if on
        ]
        name = str(self.dtype).removeprefix("torch.")
        shape = f"B {self.batch} H {heads} N {self.tokens} D {self.dk}x{self.dv}"
        return ", ".join([f"{shape} {name} decay {self.decay}", *extras])

    @property
    def shared(self) -> tuple[int, int, int]:
        """Heads of q, k and v."""
        kv_heads = self.kv_heads or self.heads
        return self.q_heads or self.heads, kv_heads, self.v_heads or kv_heads

    def log_decay(self) -> Tensor | None:
        if self.decay == "none":
            return None
        if self.decay in STEPS:
            steps = torch.tensor(STEPS[self.decay], dtype=torch.float32, device="cpu")
            # Each token takes another than its neighbours, heads and batch entries at the same token too.
            place = torch.arange(self.batch * self.heads * self.tokens, device="cpu") * 7 // 5
            return steps[place % len(steps)].view(self.batch, self.heads, self.tokens)
        if self.decay == "extreme":
            return torch.tensor(
                [EXTREMES[head % len(EXTREMES)] for head in range(self.heads)], dtype=torch.float32, device="cpu"
            )
        if self.decay in ("lightning", "mixed"):
            slopes = lightning_slopes(self.heads)
            if self.decay == "mixed":
                slopes[0], slopes[-1] = -60.0, 0.0
            return slopes
        return torch.full((self.heads,), DECAYS[self.decay], dtype=torch.float32, device="cpu").log()

    def lengths(self, ranks: int) -> tuple[int, ...]:
        """Tokens on each rank."""
        if self.shards is not None and len(self.shards) == ranks:
            return self.shards
        tile = self.tile or default_tile(self.tokens)
        if not self.uneven:
            return shard_lengths(self.tokens, ranks, tile)
        tiles = -(-self.tokens // tile)
        shares = list(accumulate(range(1, ranks + 1)))
        ends = [min(self.tokens, tiles * share // shares[-1] * tile) for share in shares]
        return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))


@dataclass
class Tensors:
    """Inputs of a case, and the gradients that flow into its outputs, as one device holds them."""

    inputs: dict[str, Tensor]
    do: Tensor
    dstate: Tensor


def make_tensors(case: Case, device: torch.device, seed: int) -> Tensors:
    """Standard normal inputs, drawn on the CPU so that every device and rank has the same ones; q scaled by Dk^-0.5."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    def rows(heads: int, dim: int) -> Tensor:
        if case.model_layout:
            return normal(case.batch, case.tokens, heads, dim).transpose(1, 2)
        return normal(case.batch, heads, case.tokens, dim)

    q_heads, k_heads, v_heads = case.shared
    states = case.batch if case.documents is None else len(case.documents) - 1
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    state = (states, case.heads, case.dk, case.dv)
    inputs = {
        "q": rows(q_heads, case.dk) * case.dk**-0.5,
        "k": rows(k_heads, case.dk),
        "v": rows(v_heads, case.dv),
    }
    log_decay = case.log_decay()
    if log_decay is not None:
        inputs["log_decay"] = log_decay.to(device, wide)
    if case.initial:
        inputs["initial_state"] = normal(*state, dtype=wide)
    return Tensors(inputs, rows(case.heads, case.dv), normal(*state, dtype=wide))


def compute(case: Case, tensors: Tensors, transport: Transport | None) -> dict[str, Tensor]:
    """Outputs and gradients of one rank's shard (of everything without a transport), by name."""
    rank, lengths = (0, (case.tokens,)) if transport is None else (transport.rank, case.lengths(transport.size))

    def shard(x: Tensor) -> Tensor:
        return x.narrow(2, sum(lengths[:rank]), lengths[rank])

    leaves: dict[str, Any] = {}
    for name, x in tensors.inputs.items():
        if name == "initial_state" and rank > 0:
            continue
        per_token = name in ("q", "k", "v") or (name == "log_decay" and x.ndim == 3)
        leaf = shard(x).detach() if per_token else x.detach().clone()
        leaves[name] = leaf.requires_grad_(case.learnt or name != "log_decay")
    documents = None if case.documents is None else torch.tensor(case.documents, dtype=torch.int64, device="cpu")
    results: Any = linear_attention(
        **leaves,
        scale=case.scale,
        return_state=case.final,
        cu_seqlens=documents,
        method=case.method,
        tile=case.tile,
        group=transport,
    )
    # The gradient of the final state is given on one rank alone: they add up over the ranks.
    share = tensors.dstate if rank == len(lengths) // 2 else torch.zeros_like(tensors.dstate)
    outputs = dict(zip(("o", "state"), results if case.final else (results,), strict=False))
    torch.autograd.backward(list(outputs.values()), [shard(tensors.do), share][: len(outputs)])
    grads = {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return {name: x.detach() for name, x in outputs.items()} | grads


@dataclass(frozen=True)
class Difference:
    """Where a rank differs from one device: the first element that does."""

    tensor: str
    rank: int
    index: tuple[int, ...]
    token: int | None
    tile: int | None
    ours: float
    single: float
    elements: int

    def __str__(self) -> str:
        where = "" if self.token is None else f", token {self.token} (tile {self.tile})"
        return (
            f"{self.tensor} differs on rank {self.rank}{where} at {self.index}: {self.ours!r} on the rank, "
            f"{self.single!r} on one device; {self.elements} elements differ"
        )


def differences(
    case: Case, rank: int, ranks: int, ours: dict[str, Tensor], single: dict[str, Tensor]
) -> Iterator[Difference]:
    """Compare a rank's tensors with one device's, with torch.equal; nothing is yielded where all bits agree."""
    lengths = case.lengths(ranks)
    tile = case.tile or default_tile(case.tokens)
    first = sum(lengths[:rank])
    for name, whole in single.items():
        per_token = name in ("o", "dq", "dk", "dv") or (name == "dlog_decay" and whole.ndim == 3)
        expected = whole.narrow(2, first, lengths[rank]) if per_token else whole
        if name == "dlog_decay" and rank > 0 and not per_token:
            expected = torch.zeros_like(whole)  # the ranks' sum is the gradient: the first rank has it all
        if name not in ours and name == "dinitial_state" and rank > 0:
            continue
        mine = ours.get(name)
        if mine is None or mine.shape != expected.shape:
            shape = None if mine is None else tuple(mine.shape)
            raise AssertionError(f"{name} on rank {rank}: shape {shape}, expected {tuple(expected.shape)}")
        if torch.equal(mine, expected):
            continue
        wrong = (mine != expected) | mine.isnan()
        index = tuple(int(i) for i in wrong.nonzero()[0])
        token = first + index[2] if per_token else None
        yield Difference(
            tensor=name,
            rank=rank,
            index=index,
            token=token,
            tile=None if token is None else token // tile,
            ours=float(mine[index]),
            single=float(expected[index]),
            elements=int(wrong.sum()),
        )


def check(case: Case, transport: Transport, device: torch.device, seed: int = 0) -> list[Difference]:
    """Compute a case on this rank and on one device, and compare; every rank of the group calls this together."""
    tensors = make_tensors(case, device, seed)
    ours = compute(case, tensors, transport)
    single = compute(case, tensors, None)
    return list(differences(case, transport.rank, transport.size, ours, single))


def standard_cases(device: torch.device, *, long: int | None = None) -> list[Case]:
    """The table that `verify` goes through."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    cases = [
        Case(1024, decay="none"),
        Case(1000, decay="lightning", batch=2, initial=True, scale=0.3),
        Case(1000, decay="mixed", uneven=True),
        Case(999, decay="slow", dk=32, dv=96, initial=True, dtype=bf16),
        Case(517, decay="fast", dk=80, dv=16, uneven=True, dtype=fp16),
        Case(300, decay="gone", dtype=bf16, model_layout=True),
        Case(640, heads=4, kv_heads=2, dk=16, dv=32, dtype=bf16, uneven=True),
        Case(900, decay="mixed", documents=(0, 130, 130, 500, 777, 900), initial=True),
        Case(1024, tile=16, decay="slow", dtype=fp16, learnt=False),
        Case(333, 17, 33, decay="slow", batch=2, initial=True),
        Case(1),
        Case(17, batch=3, decay="fast", model_layout=True),
        Case(1000, decay="mixed", uneven=True, final=False),
        Case(999, 24, 40, decay="slow", batch=2, dtype=bf16, initial=True, final=False),
        Case(900, decay="slow", documents=(0, 130, 130, 500, 900), final=False),
        Case(1000, 24, 40, batch=2, decay="tokens", uneven=True, initial=True),
        Case(
            900,
            16,
            32,
            decay="restarts",
            documents=(0, 130, 130, 500, 900),
            initial=True,
            q_heads=1,
            kv_heads=2,
            v_heads=4,
        ),
        Case(640, 32, 16, decay="slow tokens", dtype=bf16, q_heads=2, kv_heads=2, v_heads=4, uneven=True, scale=0.3),
        Case(512, decay="no steps", final=False, q_heads=2, model_layout=True),
    ]
    if device.type == "cuda":
        for dtype in (bf16, fp16, fp32):
            cases += [
                Case(16_384, 128, 128, heads=32, dtype=dtype, decay="mixed", model_layout=True),
                Case(5_000, 128, 128, heads=8, dtype=dtype, decay="slow", uneven=True, final=False),
                Case(8_000, 256, 128, heads=8, batch=2, dtype=dtype, uneven=True, initial=True),
                Case(6_000, 64, 256, heads=4, dtype=dtype, documents=(0, 1, 999, 4096, 6000)),
                Case(5_000, 128, 64, heads=8, q_heads=2, kv_heads=2, v_heads=8, dtype=dtype, uneven=True),
                Case(
                    9_000, 128, 64, heads=8, q_heads=2, kv_heads=2, v_heads=8, dtype=dtype, decay="tokens",
                    model_layout=True, initial=True,
                ),
                Case(6_000, 128, 128, heads=4, dtype=dtype, decay="restarts", documents=(0, 1, 999, 4096, 6000)),
                Case(8_000, 64, 64, heads=8, v_heads=2, dtype=dtype, decay="slow tokens", uneven=True, final=False),
            ]  # fmt: skip
        cases += [
            Case(4_000, 256, 512, heads=2, dtype=bf16, uneven=True, initial=True),
            Case(2_000, 320, 96, heads=4, v_heads=2, dtype=fp16, decay="restarts", documents=(0, 1, 999, 2000)),
            Case(4_000, 192, 128, heads=2, dtype=fp32, uneven=True),
        ]
    if long is not None:
        cases.append(Case(long, 128, 128, heads=8, dtype=bf16, decay="mixed", uneven=True))
    return cases
