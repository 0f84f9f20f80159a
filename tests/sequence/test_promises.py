"""`sequence_parallel(lengths=...)`: what is promised is not waited for, and who breaks the promise is found."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values
from leetdist.sequence import blame, transport
from leetdist.sequence.virtual import VirtualGroup


def test_what_is_known_of_other_lengths_is_no_promise() -> None:
    """Rank 0's own arguments are those of two agreements, of which the last is not what is promised now."""
    x = torch.randn(1, 2, 8192, 16)

    def rank(group: VirtualGroup) -> torch.Tensor:
        def call(last: int) -> torch.Tensor:
            local = x[:, :, :4096] if group.rank == 0 else x[:, :, 4096 : 4096 + last]
            return leetdist.linear_attention(local, local, local, group=group)

        for last in (4096, 100):
            call(last)
        with leetdist.sequence_parallel(group, lengths=[4096, 4096], timeout=2.0):
            return call(4096)

    assert torch.equal(torch.cat(leetdist.virtual_ranks(rank, 2), 2), leetdist.linear_attention(x, x, x))


def test_ranks_forget_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """More kinds of calls than are remembered, which are all one kind to rank 0 but for the lengths promised."""
    monkeypatch.setattr(transport, "KINDS", 4)
    x = torch.randn(1, 1, 32, 2)

    def rank(group: VirtualGroup) -> None:
        for last in [*range(1, 8), *range(1, 8)]:
            local = x[:, :, :16] if group.rank == 0 else x[:, :, 16 : 16 + last]
            with leetdist.sequence_parallel(group, lengths=[16, last], timeout=2.0):
                o = leetdist.linear_attention(local, local, local, tile=16)
            whole = x[:, :, : 16 + last]
            expected = leetdist.linear_attention(whole, whole, whole, tile=16)
            assert torch.equal(o, expected[:, :, :16] if group.rank == 0 else expected[:, :, 16:])

    leetdist.virtual_ranks(rank, 2)


def raised(**options: Any) -> str:
    tokens = options.pop("tokens", 64)
    x = torch.randn(1, 2, tokens, 16)
    try:
        leetdist.linear_attention(x, x, x, **{"log_decay": torch.tensor([-0.1, -0.2]), "tile": 64} | options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# What changes on rank 1, and which rank is late (2: none).
CHANGES: list[tuple[dict[str, Any], int]] = [
    ({"scale": 2.0}, 0),  # agreed on before
    ({"scale": 2.0}, 1),
    ({"tile": 32}, 1),  # new
    ({"log_decay": torch.tensor([-0.1, -0.3])}, 2),
    ({"scale": "large"}, 0),
    ({"tokens": 32}, 2),
]


def break_the_promise(rank: int) -> list[tuple[list[str], float]]:
    """What this rank is told, and how soon."""
    blame.ROLL_CALL_SECONDS = 0.2
    told = []
    for change, late in CHANGES:
        group = dist.new_group(timeout=timedelta(seconds=1))
        errors = []

        with leetdist.sequence_parallel(group, lengths=[64, 64]):
            assert [raised(), raised(scale=2.0), raised(), raised()] == [""] * 4
            dist.barrier()
            if rank == late:
                time.sleep(0.1)
            begin = time.monotonic()
            for options in (change if rank == 1 else {}, {}, {}):
                errors.append(raised(**options))
                time.sleep(0.1)
        told.append((errors, time.monotonic() - begin))
        dist.barrier()
    return told


def test_a_broken_promise_is_told() -> None:
    """No rank waits to compare what is promised, and yet one that changes one thing ends the calls of all."""
    for rank, told in enumerate(values(run_ranks(break_the_promise, 2))):
        for (change, _), (errors, seconds) in zip(CHANGES, told, strict=True):
            assert any(errors), (rank, change)
            assert seconds < 6
            first = next(error for error in errors if error)
            words = {"tokens": "promises 64", "scale": "scale must be"}.get(next(iter(change)), "")
            assert "makes another call than rank" in first or (words and words in first), first
            assert "an earlier call on this group failed" in errors[-1]
