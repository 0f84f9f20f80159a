"""The tokens before a shard: from whoever holds them, and their gradients back to there."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values

WIDTH = 3
CUTS = [(40, 24), (1, 1, 0, 2, 60), (0, 2, 62), (64, 0), (30, 1, 1, 32)]


def before(x: torch.Tensor, begin: int, width: int = WIDTH) -> torch.Tensor:
    """What comes before token `begin` of (B, N, C)."""
    return torch.cat((torch.zeros_like(x[:, :width]), x), 1)[:, begin : begin + width]


@pytest.mark.parametrize("lengths", CUTS, ids=str)
@pytest.mark.parametrize("initial", [False, True])
def test_tokens_come_from_whoever_holds_them(lengths: tuple[int, ...], initial: bool) -> None:
    x = torch.randn(2, 64, 5)
    start = torch.randn(2, WIDTH, 5)
    weights = torch.randn(len(lengths), 2, WIDTH, 5)

    def rank(group):
        mine = x.split(lengths, 1)[group.rank].clone().requires_grad_()
        first = start.clone().requires_grad_() if initial and group.rank == 0 else None
        found = leetdist.halo(mine, 1, group, width=WIDTH, initial=first)
        (found * weights[group.rank]).sum().backward()
        return found.detach(), mine.grad, None if first is None else first.grad

    whole = torch.cat((start if initial else torch.zeros_like(start), x), 1).requires_grad_()
    results = leetdist.virtual_ranks(rank, len(lengths))
    begins = [sum(lengths[:r]) for r in range(len(lengths))]
    total = torch.zeros_like(whole)
    for begin, weight, (found, _, _) in zip(begins, weights, results, strict=True):
        assert torch.equal(found, whole[:, begin : begin + WIDTH])
        total[:, begin : begin + WIDTH] += weight
    assert torch.equal(torch.cat([grad for _, grad, _ in results], 1), total[:, WIDTH:])
    if initial:
        assert torch.equal(results[0][2], total[:, :WIDTH])


def test_nothing_crosses_the_start_of_a_document() -> None:
    x = torch.randn(1, 64, 2)
    x[:, 9] = torch.nan  # of another document than any that is asked for
    documents = torch.tensor([0, 10, 10, 12, 30, 64], dtype=torch.int32)
    lengths = (11, 1, 1, 17, 10, 24)

    def rank(group):
        return leetdist.halo(x.split(lengths, 1)[group.rank], 1, group, width=WIDTH, cu_seqlens=documents)

    for r, found in enumerate(leetdist.virtual_ranks(rank, len(lengths))):
        begin = sum(lengths[:r])
        start = max(x for x in documents.tolist() if x <= begin)
        assert torch.equal(found, before(x[:, start:], begin - start))


def test_another_dimension_dtype_and_no_group() -> None:
    x = torch.arange(24).view(4, 6)

    def rank(group):
        return leetdist.halo(x.split((4, 2), 1)[group.rank], -1, group, width=2)

    first, second = leetdist.virtual_ranks(rank, 2)
    assert not first.any()
    assert torch.equal(second, x[:, 2:4])
    assert torch.equal(leetdist.halo(x, 0, None, width=1), torch.zeros(1, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": -1}, "width must be"),
        ({"width": 2.5}, "width must be"),
        ({"dim": 3}, "dim must be"),
        ({"initial": torch.zeros(1, 2, 2)}, "first rank of the group only"),
        ({"width": 2}, "rank 1 has width 2, rank 0 has 3"),
        ({"cu_seqlens": torch.zeros(3)}, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor([1, 16])}, "cu_seqlens must start at 0"),
        ({"cu_seqlens": torch.tensor([0, 9, 8, 16])}, "cu_seqlens must start at 0 and not decrease"),
        ({"cu_seqlens": torch.tensor([0, 16])}, "rank 1 has cu_seqlens (0, 16), rank 0 has None"),
        ({"x_local": torch.zeros(1, 8, 2, requires_grad=True)}, "rank 1 has requires_grad True"),
        ({"x_local": torch.zeros(1, 8, 3)}, "rank 1 has shape"),
    ],
)
def test_what_one_rank_does_wrong_all_are_told(change: dict, message: str) -> None:
    said = []

    def rank(group):
        arguments = {"x_local": torch.zeros(1, 8, 2), "dim": 1, "width": WIDTH} | (change if group.rank else {})
        try:
            leetdist.halo(arguments.pop("x_local"), arguments.pop("dim"), group, **arguments)
        except ValueError as error:
            said.append(str(error))

    leetdist.virtual_ranks(rank, 2)
    assert len(said) == 2
    assert all(message in text for text in said)


def test_what_comes_before_may_learn_elsewhere() -> None:
    """Where nothing is recorded, an initial that learns asks nothing of the others."""
    initial = torch.ones(1, WIDTH, 2, requires_grad=True)

    def rank(group):
        x, own = torch.zeros(1, 8, 2), initial if group.rank == 0 else None
        with pytest.raises(ValueError, match="initial needs a gradient" if group.rank == 0 else "rank 0 of 2"):
            leetdist.halo(x, 1, group, width=WIDTH, initial=own)
        with torch.no_grad():
            y = leetdist.nn.causal_conv1d(x, torch.ones(2, WIDTH + 1), initial=own, group=group)
            return leetdist.halo(x, 1, group, width=WIDTH, initial=own), y

    (first, y), (second, _) = leetdist.virtual_ranks(rank, 2)
    assert torch.equal(first, initial)
    assert not second.any()
    assert y[0, 0].tolist() == [WIDTH, WIDTH]


def on_processes(rank: int) -> torch.Tensor:
    x = torch.arange(40.0).view(1, 40, 1)
    mine = x.split((1, 39), 1)[rank].clone().requires_grad_()
    found = leetdist.halo(mine, 1, dist.group.WORLD, width=WIDTH)
    assert torch.equal(found, before(x, rank))
    found.sum().backward()
    return mine.grad


def test_on_processes() -> None:
    first, second = values(run_ranks(on_processes, 2))
    assert torch.equal(first, torch.ones(1, 1, 1))
    assert not second.any()


def compiled(rank: int) -> tuple[list[str], list[str]]:
    x = torch.arange(40.0).view(1, 40, 1)
    mine = x.split((1, 39), 1)[rank]
    leetdist.halo(mine, 1, dist.group.WORLD, width=WIDTH)  # a group's first use
    call = torch.compile(
        lambda x, width: leetdist.halo(x, 1, dist.group.WORLD, width=width), backend="aot_eager", dynamic=False
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(call(mine, WIDTH), before(x, rank))
        told = []
        for width in (WIDTH + rank, WIDTH):
            try:
                call(mine, width)
            except ValueError as error:
                told.append(str(error))
    return told, [str(warning.message) for warning in seen if "Dynamo does not know" in str(warning.message)]


def test_compiled_calls_compare_what_ranks_ask_for() -> None:
    """Each time, outside of the graph: nothing of what hosts tell each other is traced."""
    for told, traced in values(run_ranks(compiled, 2)):
        assert told == [f"halo: rank 1 has width {WIDTH + 1}, rank 0 has {WIDTH}"]
        assert traced == []


def test_calls_of_a_group_import_no_compiler() -> None:
    """Which takes seconds."""
    program = """
import sys, torch, torch.distributed as dist, leetdist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = torch.ones(1, 1, 16, 16)
leetdist.linear_attention(x, x, x, group=dist.group.WORLD)
leetdist.halo(x, 2, dist.group.WORLD, width=1)
assert "torch._dynamo" not in sys.modules
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
