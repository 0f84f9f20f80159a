"""Random calls, their arguments in any form that a view can have: `LEETDIST_ANY_CALLS=1000 python
tests/engine/any_calls.py` makes as many, four of five of them sharded; others for each LEETDIST_TEST_SEED.

A call is compared with the fp64 recurrence, with the same call on plain copies, and its shards with one device, the
last two with torch.equal.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import leetdist
from leetdist import reference

BOUNDS = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 8e-3}


def forms(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """x's values in memory of another shape, order or sign."""
    yield "plain", x
    yield "reversed", x.flip(-1).contiguous().flip(-1)
    for dim in {0, x.ndim - 1, x.ndim // 2}:
        every = x.repeat_interleave(2, dim)
        yield f"every second of {dim}", every[(slice(None),) * dim + (slice(None, None, 2),)]
        wider = torch.cat([torch.full_like(x, 7), x, torch.full_like(x, 7)], dim)
        yield f"a slice of {dim}", wider.narrow(dim, x.shape[dim], x.shape[dim])
        yield f"transposed {dim}", x.transpose(dim, 0).contiguous().transpose(dim, 0)
        yield f"a column of {dim}", torch.stack([x, x], -1)[..., 1]
    if x.is_floating_point():
        yield "negative", torch.complex(-x.double(), -x.double()).conj().imag.to(x.dtype) if x.dtype not in (
            torch.float32, torch.float64) else torch.complex(x, -x).conj().imag  # fmt: skip


def drawn(x: Tensor, rng: random.Random) -> Tensor:
    name, form = rng.choice(list(forms(x)))
    assert torch.equal(form, x), name
    return form


@dataclass(frozen=True)
class Call:
    """One random call: what it is given, and how it is cut."""

    given: dict[str, Any]
    options: dict[str, Any]
    do: Tensor
    dstate: Tensor
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        shapes = {name: (tuple(x.shape), x.dtype) for name, x in self.given.items() if isinstance(x, Tensor)}
        decay = self.given.get("log_decay")
        shown = decay if decay is None or decay.ndim == 1 else "a decay a token"
        return f"{shapes} {shown} {self.options} shards {self.lengths}"


def draw(rng: random.Random, *, sharded: bool) -> Call:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 31))
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shared = rng.choice([(1, 1, 1), (2, 1, 1), (4, 2, 2), (3, 3, 3), (1, 1, 4), (6, 2, 3)])
    heads = max(shared)
    tokens, dk, dv = rng.choice([1, 2, 15, 16, 33, 97, 200]), rng.choice([1, 3, 16, 17]), rng.choice([1, 2, 16, 24])
    tile = rng.choice([16, 32, 64])
    documents = None
    if rng.random() < 0.3:
        documents = [0, *sorted(rng.randint(0, tokens) for _ in range(rng.randint(0, 4))), tokens]
    batch = 1 if documents else rng.randint(1, 2)
    rows = len(documents) - 1 if documents else batch

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        return x[:1].expand(shape) if rng.random() < 0.1 else x

    given: dict[str, Any] = {
        name: normal(batch, own, tokens, dim) for name, own, dim in zip("qkv", shared, (dk, dk, dv), strict=True)
    }  # fmt: skip
    if rng.random() < 0.8:
        shape = rng.choice([(heads,), (batch, heads, tokens)])
        strong = [-30.0, -110.0, -1e4, -math.inf] if rng.random() < 0.8 else []
        values = rng.choices([0.0, -1e-4, -0.1, -2.0, *strong], k=math.prod(shape))
        given["log_decay"] = torch.tensor(values, dtype=rng.choice([wide, torch.float64]), device="cpu").view(shape)
    if rng.random() < 0.4:
        given["initial_state"] = normal(rows, heads, dk, dv, dtype=wide)
    if documents:
        kind = rng.choice([torch.int32, torch.int64])
        given["cu_seqlens"] = torch.tensor(documents, dtype=kind, device="cpu")
    options = {
        "scale": rng.choice([1.0, -0.3, 0.25]), "tile": tile, "return_state": rng.random() < 0.6,
        "method": rng.choice(["auto", "block", "lightning", "fleet", "causal_dot_product"]),
    }  # fmt: skip
    lengths = (tokens,)
    if sharded:
        ranks = rng.randint(2, 5)
        tiles = -(-tokens // tile)
        cuts = sorted(rng.randint(0, tiles) * tile for _ in range(ranks - 1))
        if documents and rng.random() < 0.5:  # packed documents are cut anywhere
            cuts = sorted(rng.randint(0, tokens) for _ in range(ranks - 1))
        ends = [0, *(min(tokens, cut) for cut in cuts), tokens]
        lengths = tuple(end - begin for begin, end in itertools.pairwise(ends))
    return Call(given, options, normal(batch, heads, tokens, dv), normal(rows, heads, dk, dv, dtype=wide), lengths)


def compute(call: Call, rng: random.Random | None, group: Any = None, *, grad: bool = True) -> dict[str, Tensor]:
    """Outputs and gradients of a rank's share, from `drawn` forms of everything that it is given, or plain copies."""
    rank, lengths = (0, (sum(call.lengths),)) if group is None else (group.rank, call.lengths)

    def form(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format) if rng is None else drawn(x, rng)

    def shard(x: Tensor) -> Tensor:
        return x.narrow(2, sum(lengths[:rank]), lengths[rank])

    leaves, views = {}, {}
    for name, x in call.given.items():
        if name == "initial_state" and rank > 0:
            continue
        x = shard(x) if name in "qkv" or (name == "log_decay" and x.ndim == 3) else x
        if name == "cu_seqlens":
            views[name] = form(x)
            continue
        leaves[name] = x.clone(memory_format=torch.contiguous_format).requires_grad_(grad)
        views[name] = form(leaves[name]) if x.numel() else leaves[name]
    results = leetdist.linear_attention(**views, **call.options, group=group)
    outputs = list(results) if call.options["return_state"] else [results]
    found = dict(zip(("o", "state"), [x.detach() for x in outputs], strict=False))
    if grad:
        share = call.dstate if rank == len(lengths) // 2 else torch.zeros_like(call.dstate)
        incoming = [form(x) if x.numel() else x for x in (shard(call.do), share)][: len(outputs)]
        torch.autograd.backward(outputs, incoming)
        found |= {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return found


def oracle(call: Call) -> dict[str, Tensor]:
    """Outputs and states in fp64."""
    given = {name: x.double() for name, x in call.given.items() if name != "cu_seqlens"}
    bounds = call.given["cu_seqlens"].tolist() if "cu_seqlens" in call.given else [0, sum(call.lengths)]
    outputs, states = [], []
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        initial = given.get("initial_state")
        if initial is not None and "cu_seqlens" in call.given:
            initial = initial[row : row + 1]
        if begin == end:
            states.append(torch.zeros_like(call.dstate[:1]).double() if initial is None else initial)
            continue
        decay = given.get("log_decay")
        own = decay[:, :, begin:end] if decay is not None and decay.ndim == 3 else decay
        parts = (given[name][:, :, begin:end] for name in "qkv")
        o, state = reference.recurrence(*parts, own, scale=call.options["scale"], initial_state=initial)
        outputs.append(o)
        states.append(state)
    return {"o": torch.cat(outputs, 2), "state": torch.cat(states)}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def faults(seed: int, *, sharded: bool) -> list[str]:
    """What is wrong with one random call, under defaults and modes that must change nothing."""
    rng = random.Random(seed)
    call = draw(rng, sharded=sharded)
    grad, mode = rng.random() < 0.8, rng.choice([torch.inference_mode, torch.no_grad])
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    device = rng.choice([None, None, "meta"])
    plain = compute(call, None)
    found = []
    for name, exact in oracle(call).items():
        if name in plain and not reference.relative_error(plain[name], exact) <= BOUNDS[call.do.dtype]:
            found.append(f"{name} is off by {reference.relative_error(plain[name], exact):.1e}")
    found += [f"{name} is not finite" for name, x in plain.items() if not x.isfinite().all()]

    def rank(group: Any) -> dict[str, Tensor]:
        with ExitStack() as stack:  # those of a thread
            if device is not None:
                stack.enter_context(torch.device(device))
            if not grad:
                stack.enter_context(mode())
            own = random.Random(f"{seed} {0 if group is None else group.rank}")
            return compute(call, own, group, grad=grad)

    with default_dtype(dtype):
        parts = leetdist.virtual_ranks(rank, len(call.lengths)) if sharded else [rank(None)]
    for name in parts[0]:
        mine = [part[name] for part in parts if name in part]
        if name in ("o", "dq", "dk", "dv") or (name == "dlog_decay" and mine[0].ndim == 3):
            whole = torch.cat(mine, 2)
        elif name == "dlog_decay":
            whole = torch.stack(mine).sum(0)
        else:
            whole = mine[0]
            found += [f"{name} differs between ranks" for x in mine[1:] if not torch.equal(x, whole)]
        if not torch.equal(whole, plain[name]):
            found.append(f"{name} has other bits than one device on plain copies")
    return [f"{fault} (seed {seed}, {'sharded' if sharded else 'alone'}): {call}" for fault in found]


def main() -> int:
    count, bad = int(os.environ.get("LEETDIST_ANY_CALLS", "1000")), 0
    first = int(os.environ.get("LEETDIST_TEST_SEED", "0")) * count
    for seed in range(first, first + count):
        try:
            found = faults(seed, sharded=seed % 5 != 0)
        except Exception as error:
            found = [f"{type(error).__name__}: {error} (seed {seed})"]
        bad += bool(found)
        for fault in found:
            print(fault, flush=True)
    print(f"{count} calls, {bad} with faults")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
