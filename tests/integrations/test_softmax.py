"""Softmax attention of a sharded sequence: every number of heads, on ranks that share them and on ranks that cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import leetdist
from helpers import run_ranks, values
from leetdist.integrations import softmax
from leetdist.integrations.softmax import softmax_attention
from leetdist.reference import relative_error
from leetdist.sequence.group import resolve

TOKENS, DIM = 96, 8
# Heads of q, of k and v; whether 2, 3 and 4 ranks share them.
HEADS = {
    (4, 4): (2, 4),
    (4, 2): (2, 4),
    (4, 1): (2, 4),
    (6, 2): (2, 3),
    (12, 2): (2, 3, 4),
    (8, 8): (2, 4),
    (9, 3): (3,),
}


def without_queries(rank: int, ranks: int) -> Tensor:
    """The gradient of k, where rank 0 has no tokens, and heads that no two ranks share."""
    group = leetdist.device_mesh()["sp"]
    q, k, v = (torch.ones(1, h, 16 * rank, DIM, requires_grad=True) for h in (3, 1, 1))
    softmax_attention(q, k, v, group).sum().backward()
    assert k.grad is not None
    return k.grad


def test_a_rank_without_tokens_is_there_in_the_backward_pass() -> None:
    none, some = values(run_ranks(without_queries, 2, 2, frameworks=True))
    assert none.shape[2] == 0
    assert some.isfinite().all()


def penalized(rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the gradient of the cubes' sum behind an exchange, and that of its square."""
    x = torch.randn(1, 2, 3 + rank, DIM, dtype=torch.float64, requires_grad=True)
    y = softmax._Exchange.apply(x, (3, 4), resolve(leetdist.device_mesh()["sp"]), True)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return x.detach(), first.detach(), second


def test_second_derivatives_travel_too() -> None:
    for x, first, second in values(run_ranks(penalized, 2, 2, frameworks=True)):
        torch.testing.assert_close(first, 3 * x**2)
        torch.testing.assert_close(second, 36 * x**3)


def gradients(heads: tuple[int, int], group: object) -> tuple[list[Tensor], list[Tensor]]:
    """o and the gradients of q, k and v: this rank's shards of one process's, and its own."""
    generator = torch.Generator().manual_seed(0)
    of_q, of_k = heads
    shapes = [(2, h, TOKENS, DIM) for h in (of_q, of_k, of_k, of_q)]
    *whole, do = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    results = []
    for given in (None, group):
        mine = [x if given is None else leetdist.shard_sequence(x, 2, given).clone() for x in (*whole, do)]
        leaves = [x.requires_grad_() for x in mine[:3]]
        o = softmax_attention(*leaves, given)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, mine[3])])
    return [leetdist.shard_sequence(x, 2, group) for x in results[0]], results[1]


def on_ranks(rank: int, ranks: int) -> None:
    group = leetdist.device_mesh()["sp"]
    gathered: list[int] = []
    gather = softmax.gather_sequence
    softmax.gather_sequence = lambda x, *rest: gathered.append(1) or gather(x, *rest)
    for heads, sharing in HEADS.items():
        gathered.clear()
        for expected, found in zip(*gradients(heads, group), strict=True):
            assert relative_error(found, expected) < 1e-12, heads
        assert bool(gathered) == (ranks not in sharing), heads


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_heads_on_ranks(ranks: int) -> None:
    values(run_ranks(on_ranks, ranks, ranks, frameworks=True))
