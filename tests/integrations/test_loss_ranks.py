"""reduce_loss on ranks that do not make the same call: each of them hears of it at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import leetdist
from helpers import run_ranks, values

OTHERS: dict[str, tuple[Callable[[bool], dict[str, Any]], str]] = {
    "gradients": (lambda odd: {"gradients": "sum" if odd else "mean"}, "rank 1 has gradients sum, rank 0 has mean"),
    "some": (lambda odd: {"total_tokens": None if odd else 5}, "rank 1 has total_tokens None, rank 0 has 5.0"),
    "values": (lambda odd: {"total_tokens": 6 if odd else 5}, "rank 1 has total_tokens 6.0, rank 0 has 5.0"),
    "tensors": (lambda odd: {"total_tokens": torch.tensor(5 + odd)}, "rank 1 has total_tokens 6.0, rank 0 has 5.0"),
    "bad": (lambda odd: {"total_tokens": -1 if odd else 5}, "total_tokens must be a number of tokens, at least 0"),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_ranks_that_differ_are_told(what: str) -> None:
    options, words = OTHERS[what]

    def rank(group: Any) -> float:
        for _ in range(2):  # also once the right call is known
            with pytest.raises(ValueError, match=words):
                leetdist.reduce_loss(torch.tensor(2.0), 3, group, **options(group.rank == 1))
            loss = leetdist.reduce_loss(torch.tensor(2.0), 3, group, **options(False))
        return loss.item()

    assert len(set(leetdist.virtual_ranks(rank, 3))) == 1


def of_a_mesh(rank: int) -> float:
    mesh = leetdist.device_mesh(sequence=2)
    leetdist.reduce_loss(torch.tensor(2.0), 4, mesh)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="loss_sum must be a scalar tensor"):
        leetdist.reduce_loss(torch.zeros(2 if rank == 0 else 1).squeeze(), 3, mesh)
    assert time.monotonic() - begin < 30
    return leetdist.reduce_loss(torch.tensor(2.0), 4, mesh).item()


def test_all_ranks_of_a_mesh_are_told() -> None:
    assert values(run_ranks(of_a_mesh, 4, timeout_s=120)) == [0.5] * 4
