"""Sequences of one tile have no states where nobody gives or wants one; their bits are those of a call by itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import leetdist
from leetdist.engine.planning import plan_call
from leetdist.kernels.common.tiles import Tiles
from leetdist.reference import relative_error

HEADS, D = 2, 8
LENGTHS = (3, 70, 16, 0, 5, 40, 1)  # of 16 tokens a tile: the second and the one before the last have several
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
OPTIONS: dict[str, Any] = {"scale": 1.0, "method": "block", "tile": 16, "precision": None}
OPTIONS |= {"initial_state": None, "return_state": False, "cu_seqlens": None}


def drawn(tokens: int, *, gates: bool = False) -> list[torch.Tensor]:
    q, k, v, do = (torch.randn(1, HEADS, tokens, D) for _ in range(4))
    decay = -torch.rand(1, HEADS, tokens) if gates else -torch.rand(HEADS)
    return [q, k, v, decay, do]


def with_gradients(
    q: Any, k: Any, v: Any, decay: Any, do: Any, *, learnt: bool = False, **options: Any
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in ((q, k, v, decay) if learnt else (q, k, v))]
    o = leetdist.linear_attention(*leaves, *([] if learnt else [decay]), tile=16, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("method", ["block", "fleet", "recursion", "lightning", "causal_dot_product"])
@pytest.mark.parametrize(("gates", "learnt"), [(False, False), (True, False), (True, True)])
def test_packed_beside_longer_ones(method: str, gates: bool, learnt: bool) -> None:
    x = drawn(int(BOUNDS[-1]), gates=gates)
    packed = with_gradients(*x, cu_seqlens=BOUNDS, method=method, learnt=learnt)
    for begin, end in pairwise(BOUNDS.unique().tolist()):
        own = [y if y.ndim == 1 else y[:, :, begin:end] for y in x]
        for ours, alone in zip(packed, with_gradients(*own, method=method, learnt=learnt), strict=True):
            assert torch.equal(ours[:, :, begin:end], alone)


@pytest.mark.parametrize("gates", [False, True])
def test_a_learnt_decay_beside_longer_ones(gates: bool) -> None:
    """Against the recurrence in fp64; and with the bits of a call whose tiles all have states, for it gives some."""
    x = drawn(int(BOUNDS[-1]), gates=gates)
    packed = with_gradients(*x, cu_seqlens=BOUNDS, learnt=True)
    right = with_gradients(*(y.double() for y in x), cu_seqlens=BOUNDS, learnt=True, method="recursion")
    for ours, theirs in zip(packed, right, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    initial = torch.zeros(len(LENGTHS), HEADS, D, D)
    for ours, theirs in zip(
        packed, with_gradients(*x, cu_seqlens=BOUNDS, learnt=True, initial_state=initial), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_packed_over_ranks(ranks: int, learnt: bool) -> None:
    x = drawn(int(BOUNDS[-1]))
    whole = with_gradients(*x, cu_seqlens=BOUNDS, learnt=learnt)
    cuts = [0, *(len(LENGTHS) * 16 * rank // ranks for rank in range(1, ranks)), int(BOUNDS[-1])]

    def shard(group: Any) -> list[torch.Tensor]:
        begin, end = cuts[group.rank], cuts[group.rank + 1]
        own = [y if y.ndim == 1 else y[:, :, begin:end] for y in x]
        return with_gradients(*own, cu_seqlens=BOUNDS, group=group, learnt=learnt)

    parts = leetdist.virtual_ranks(shard, ranks)
    for name, one, *shards in zip(("o", "dq", "dk", "dv", "dg")[: len(whole)], whole, *parts, strict=True):
        assert torch.equal(sum(shards) if name == "dg" else torch.cat(shards, 2), one), name


def planned(tokens: int, **options: Any) -> Any:
    q, k, v, decay, _ = drawn(tokens)
    decay.requires_grad_(options.pop("learnt", False))
    return plan_call(q, k, v, decay, transport=None, **OPTIONS | options)


def test_who_has_states() -> None:
    short, long = planned(16), planned(17)
    assert not short.linked
    assert short.alone.count == 1
    assert long.linked
    assert long.alone is None
    packed = planned(int(BOUNDS[-1]), cu_seqlens=BOUNDS)
    assert [count for _, count in packed.alone.spans] == [3, 16, 5, 1]
    assert packed.tiles.count == 5 + 3
    assert packed.every_tile.count == 12
    assert planned(16, learnt=True).alone is not None
    for asked in ({"return_state": True}, {"initial_state": torch.zeros(1, HEADS, D, D)}):
        assert planned(16, **asked).alone is None


def test_nothing_is_kept_for_the_backward() -> None:
    saved: list[int] = []
    q, k, v, decay, _ = drawn(100)
    own = {x.data_ptr() for x in (q, k, v, decay)}
    q.requires_grad_()
    bounds = torch.arange(0, 101, 10)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.append(0 if x.data_ptr() in own else x.numel()), x)[1], lambda x: x
    ):
        leetdist.linear_attention(q, k, v, decay, cu_seqlens=bounds, tile=16)
    assert sum(saved) <= bounds.numel()


@pytest.mark.parametrize("bounds", [BOUNDS, torch.tensor([0, 12])])
def test_a_decay_learnt_where_the_plan_does_not_know_it(bounds: torch.Tensor) -> None:
    """As in compiled calls and torch.func, whose backward pass is another op."""
    q, k, v, decay, do = drawn(int(bounds[-1]))

    def loss(decay: torch.Tensor) -> torch.Tensor:
        return (leetdist.linear_attention(q, k, v, decay, cu_seqlens=bounds, tile=16) * do).sum()

    learnt = decay.clone().requires_grad_()
    (eager,) = torch.autograd.grad(loss(learnt), learnt)
    assert torch.equal(torch.func.grad(loss)(decay), eager)


def test_chosen_segments() -> None:
    tiles = Tiles(4, (0, 3, 3, 12, 14), (0, 2))
    assert tiles.spans == ((0, 3), (3, 4), (7, 4), (11, 1))
    assert tiles.first_tile == (0, 1, 4)
    assert not tiles.regular
    finer, own = tiles.finer(2)
    assert finer.spans == ((0, 2), (2, 1), (3, 2), (5, 2), (7, 2), (9, 2), (11, 1))
    assert own.spans == finer.spans
    assert own.first_tile == (0, 2, 4, 6, 7)
    linked, alone = Tiles(4, (0, 3, 3, 12, 14)).parted({3})
    assert linked.spans == ((3, 4), (7, 4), (11, 1), (12, 2))
    assert alone.spans == ((0, 3),)
