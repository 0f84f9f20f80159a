"""Have prefill in pieces, decoding and drafts the bits of one call on P ranks? The check behind `verify --decode`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leetdist.api import linear_attention
from leetdist.inference.pool import StatePool
from leetdist.inference.state import State
from leetdist.inference.stream import stream
from leetdist.sequence.grid import shard_lengths
from leetdist.sequence.transport import Transport
from leetdist.testing.equality import Case, make_tensors

MOST = 8  # tokens of a step


@dataclass(frozen=True)
class DecodingDifference:
    """The first output that differs from one call's."""

    doing: str
    token: int
    tile: int
    chunk: int
    row: int
    head: int
    ours: float
    one_call: float

    def __str__(self) -> str:
        return (
            f"{self.doing}: o differs first at token {self.token} (tile {self.tile}, chunk {self.chunk} of it), row "
            f"{self.row}, head {self.head}: {self.ours!r}, {self.one_call!r} in one call"
        )


def decoding_cases(device: torch.device) -> list[Case]:
    """The table that `verify --decode` goes through: calls of method "block" with a tile."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    cases = [
        Case(700, 16, 24, batch=2, tile=128, dtype=fp32, decay="mixed", scale=0.3),
        Case(500, 64, 64, tile=64, dtype=bf16, decay="slow", heads=4, kv_heads=2),
        Case(600, 32, 16, tile=256, dtype=fp16, decay="lightning", q_heads=1, kv_heads=2, v_heads=4),
        Case(700, 24, 40, batch=2, tile=256, dtype=fp32, decay="tokens", q_heads=2, kv_heads=2, v_heads=4),
        Case(500, 64, 32, tile=128, dtype=bf16, decay="restarts", scale=0.3),
    ]
    if device.type == "cuda":
        for dtype in (bf16, fp16, fp32):
            cases += [
                Case(3_000, 128, 128, batch=2, heads=8, tile=512, dtype=dtype, decay="lightning", model_layout=True),
                Case(3_000, 64, 128, heads=8, q_heads=2, kv_heads=2, v_heads=8, tile=256, dtype=dtype, decay="tokens"),
            ]
        cases += [
            Case(600, 256, 512, tile=128, dtype=bf16, decay="lightning", heads=2),
            Case(300, 320, 96, tile=128, dtype=fp16, decay="tokens", heads=2),
        ]
    return cases


def check_decoding(case: Case, transport: Transport, device: torch.device, seed: int) -> list[DecodingDifference]:
    """One case on this rank; every rank of the group calls this together. The first difference of each kind of act."""
    given = {name: x for name, x in make_tensors(case, device, seed).inputs.items() if name != "initial_state"}
    decay = given.pop("log_decay", None)
    tensors = [*given.values(), *([decay] if decay is not None and decay.ndim == 3 else [])]
    a_head = decay if decay is None or decay.ndim == 1 else None
    found: dict[str, DecodingDifference] = {}
    with torch.no_grad():
        whole = _on_the_ranks(case, tensors, a_head, transport)
        for doing, first, o in _acts(case, tensors, a_head, transport, random.Random(seed)):
            expected = whole[:, :, first : first + o.shape[2]]
            if doing not in found and not torch.equal(o, expected):
                chunk = _chunk(case, tensors, a_head)
                found[doing] = _first(doing, first, o, expected, case.tile or 0, chunk)
    return list(found.values())


def _on_the_ranks(case: Case, tensors: list[Tensor], decay: Tensor | None, transport: Transport) -> Tensor:
    """The outputs of one training call on the ranks, whole on each of them."""
    lengths = case.lengths(transport.size)
    begin = sum(lengths[: transport.rank])
    q, k, v, *own = (x.narrow(2, begin, lengths[transport.rank]) for x in tensors)
    o: Any = linear_attention(
        q, k, v, own[0] if own else decay,
        scale=case.scale, method="block", tile=case.tile, group=transport,
    )  # fmt: skip
    shards = transport.gather_objects(o.cpu(), "the outputs of the training call")
    return torch.cat([shard.to(o.device) for shard in shards], 2)


def _acts(
    case: Case, tensors: list[Tensor], decay: Tensor | None, transport: Transport, chance: random.Random
) -> Iterator[tuple[str, int, Tensor]]:
    """(what was done, the first token of it, its outputs), on each rank for itself after a prompt that they share."""
    tile, tokens = case.tile or 0, case.tokens
    shared = chance.randint(1, tokens // 2)
    running = stream(decay, scale=case.scale, tile=tile, group=transport)
    lengths = shard_lengths(shared, transport.size, tile)
    begin = sum(lengths[: transport.rank])
    yield "prefill on ranks", begin, running.push(*(x.narrow(2, begin, lengths[transport.rank]) for x in tensors))
    age, state = shared, running.state
    while age < tokens * 2 // 3:
        running, end = stream(state=state), min(tokens, age + chance.randint(1, tile))
        yield "prefill in pieces", age, running.push(*(x[:, :, age:end] for x in tensors))
        age, state = end, running.state
    yield from _decoded(tensors, state, chance)


def _decoded(tensors: list[Tensor], state: State, chance: random.Random) -> Iterator[tuple[str, int, Tensor]]:
    """The rest one by one, in steps, and by drafts of which some are refused; the slots move in between."""
    tokens, rows = tensors[0].shape[2], tensors[0].shape[0]
    pool = StatePool(2 * rows, like=state, exact=True)
    index, age = torch.tensor(pool.put(state), device=state.device), state.tokens
    while age < tokens:
        count = min(chance.choice((1, 1, chance.randint(2, MOST))), tokens - age)
        doing = chance.choice(("decoding", "a draft", "a draft, of which a part is kept"))
        kept = count if doing == "decoding" else 0 if doing == "a draft" else chance.randint(0, count)
        lengths = None if doing == "decoding" else torch.full((rows,), kept, device=state.device)
        q, k, v, *own = (x[:, :, age : age + count] for x in tensors)
        yield doing, age, pool.steps(q, k, v, index, lengths, log_decay=own[0] if own else None)
        age += kept
        if chance.random() < 0.05:
            moved = [pool.take(slot) for slot in index.tolist()]
            pool.release(index.tolist())
            index = torch.tensor([pool.put(one)[0] for one in reversed(moved)][::-1], device=state.device)


def _chunk(case: Case, tensors: list[Tensor], decay: Tensor | None) -> int:
    """Tokens of a chunk in the kernels here."""
    running = stream(decay, tile=case.tile)
    running.push(*(x[:, :, :1] for x in tensors))
    return running.state.opened.chunk


def _first(doing: str, first: int, o: Tensor, expected: Tensor, tile: int, chunk: int) -> DecodingDifference:
    """Of the tokens the first; of its outputs one."""
    wrong = (o != expected) | o.isnan()
    token = int(wrong.any(3).any(1).any(0).nonzero()[0])
    row, head, column = (int(i) for i in wrong[:, :, token].nonzero()[0])
    at = first + token
    return DecodingDifference(
        doing, at, at // tile, at % tile // chunk, row, head,
        float(o[row, head, token, column]), float(expected[row, head, token, column]),
    )  # fmt: skip


__all__ = ["DecodingDifference", "check_decoding", "decoding_cases"]
