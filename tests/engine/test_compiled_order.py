"""Compiled calls of a group run in the order of the program on every rank, whatever lengths its ranks hold."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import leetdist
from helpers import run_ranks, values
from leetdist.reference import relative_error

TILE, DIM = 16, 16
LENGTHS = (16, 1024)
DECAY = torch.tensor([-0.01, -0.2])


def attention(x: Tensor, group: Any) -> Tensor:
    """Without operations that Inductor compiles, which takes a minute: what it orders are calls and products."""
    heads = x.unflatten(-1, (2, DIM)).transpose(1, 2)
    o = leetdist.linear_attention(heads, heads, heads, DECAY, scale=0.3, tile=TILE, group=group)
    return o.transpose(1, 2).flatten(2)


def two_calls(x: Tensor, w: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Which of the two takes less memory first depends on the length of x."""
    a = attention(x, group)
    b = attention(x @ (w @ w), group)
    return a, b


def checkpointed(x: Tensor, w: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    a = checkpoint(attention, x, group, use_reentrant=False)
    b = checkpoint(attention, x @ (w @ w), group, use_reentrant=False)
    return a, b


def two_sequences(x: Tensor, w: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """One model on two sequences; the second is longer on the rank whose first is shorter."""
    other = torch.cat([x, x], 1) if x.shape[1] == LENGTHS[0] else x[:, : LENGTHS[0]]
    a, b = (attention(y @ w, group) for y in (x, other))
    return attention(a @ w, group), attention(b @ w, group)


def one_unused(x: Tensor, w: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """A rank that does not look at a result computes it all the same: the others wait for it."""
    a, b = two_calls(x, w, group)
    return (b, b) if group is not None and dist.get_rank() == 0 else (b, a)


def results(function: Any, x: Tensor, w: Tensor, group: Any, *, backward: bool) -> list[Tensor]:
    x, w = x.clone().requires_grad_(backward), w.clone().requires_grad_(backward)
    a, b = function(x, w, group)
    if backward:
        (a.square().mean() + b.sin().mean()).backward()
    return [a.detach(), b.detach(), *(y.grad for y in (x, w) if y.grad is not None)]


def over_ranks(rank: int, names: tuple[str, ...], backend: str, backward: bool) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(2 * DIM, 2 * DIM, generator=generator) / 6
    x = torch.randn(1, sum(LENGTHS), 2 * DIM, generator=generator).split(LENGTHS, 1)[rank]
    for name in names:
        function = getattr(sys.modules[__name__], name)
        expected = results(function, x, w, dist.group.WORLD, backward=backward)
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        for found, wanted in zip(results(compiled, x, w, dist.group.WORLD, backward=backward), expected, strict=True):
            assert relative_error(found, wanted) < 1e-5, name


@pytest.mark.slow
def test_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Inductor, which orders what may be ordered freely."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of its own
    names = ("two_calls", "two_sequences", "checkpointed")
    values(run_ranks(over_ranks, 2, names, "inductor", True, timeout_s=90))


def test_unused_result() -> None:
    values(run_ranks(over_ranks, 2, ("one_unused",), "aot_eager", False, timeout_s=60))
