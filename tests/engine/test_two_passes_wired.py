"""Where somebody makes all gradients of a call in two passes, the engine hands the second what the first has left, lane
by lane and rank by rank; a stand-in in PyTorch says what it was asked."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist
from helpers import forget_kernels
from leetdist.kernels.constant_decay.pytorch import block as constant_block
from leetdist.kernels.token_decay.pytorch import block as token_block
from leetdist.operators.facts import Facts
from leetdist.operators.implementations import CANDIDATES, Implementation

BLOCKS = {"token_decay": token_block, "constant_decay": constant_block}
OPERATORS = tuple(BLOCKS)
TILE = 32


def early_gradients(q, k, v, do, states, log_decay, tiles, *, scale, out):
    block = token_block if log_decay.ndim == 3 else constant_block
    options: dict[str, Any] = {"reverse": False, "scale": scale, "state_scale": scale, "out_dtype": q.dtype}
    dq = block.tile_outputs(do, v, k, states.mT, log_decay, tiles, out=out, **options)
    return dq, {"sum_of_do": do.sum(dim=(2, 3))}


def late_gradients(q, k, v, do, states, ends, log_decay, tiles, kept, *, scale, outs):
    assert torch.equal(kept["sum_of_do"], do.sum(dim=(2, 3)))  # this lane's, and no other's
    block = token_block if log_decay.ndim == 3 else constant_block
    options: dict[str, Any] = {"reverse": True, "scale": scale, "state_scale": 1.0, "out_dtype": q.dtype}
    dk = block.tile_outputs(v, do, q, ends.mT, log_decay, tiles, out=outs[0], **options)
    dv = block.tile_outputs(k, q, do, ends, log_decay, tiles, out=outs[1], **options)
    more: dict[str, Any] = {} if outs[2] is None else {"out": outs[2]}  # where other tiles have theirs already
    return dk, dv, block.decay_gradient(q, k, v, do, states, ends, log_decay, tiles, scale=scale, **more)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Steps that the stand-in was asked for, in their order."""
    asked: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return function(*args, **kwargs)

        return step

    def refusal(facts: Facts) -> str | None:
        return None if facts.shares == (1, 1, 1) else "heads that share nothing"

    for operator in OPERATORS:
        name = f"leetdist.kernels.{operator}.stand_in"
        module = types.ModuleType(name)
        for function in (early_gradients, late_gradients):
            monkeypatch.setattr(module, function.__name__, counted(function.__name__, function), raising=False)
        monkeypatch.setitem(sys.modules, name, module)
    here = tuple(Implementation("stand-in", "stand_in", refusal, operator=operator) for operator in OPERATORS)
    for step in ("early_gradients", "late_gradients"):
        monkeypatch.setitem(CANDIDATES, step, here)
    forget_kernels()
    yield asked
    forget_kernels()


def gradients(given: list[Tensor], own: slice = slice(None), **options: Any) -> list[Tensor]:
    q, k, v, do = (x[:, :, own] for x in given[:4])
    g = given[4] if given[4].ndim == 1 else given[4][:, :, own]
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
    o = leetdist.linear_attention(*leaves, tile=TILE, **options)
    return list(torch.autograd.grad(o, leaves, do))


def draw(operator: str, heads: int = 4, k_heads: int = 4) -> list[Tensor]:
    q, k, v, do = (torch.randn(2, own, 200, 8) for own in (heads, k_heads, heads, heads))
    return [q, k, v, do, -torch.rand(*((heads,) if operator == "constant_decay" else (2, heads, 200)))]


def one_by_one(given: list[Tensor], **options: Any) -> list[Tensor]:
    """The same with nobody who makes them in two passes."""
    with pytest.MonkeyPatch.context() as patch:
        for step in ("early_gradients", "late_gradients"):
            patch.setitem(CANDIDATES, step, ())
        forget_kernels()
        return gradients(given, **options)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_what_the_first_leaves_reaches_the_second(calls, ranks, operator):
    given, bounds = draw(operator), {1: [0, 200], 3: [0, 64, 64, 200]}[ranks]

    def rank(group: Any) -> list[Tensor]:
        return gradients(given, slice(bounds[group.rank], bounds[group.rank + 1]), group=group)

    parts = zip(*leetdist.virtual_ranks(rank, ranks), strict=True)
    found = [torch.cat(x, 2) if x[0].ndim > 1 else sum(x[1:], x[0]) for x in parts]
    assert {"early_gradients", "late_gradients"} == set(calls)
    calls.clear()
    expected = one_by_one(given)
    assert not calls
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_kinds_of_tiles_have_two_passes_each(calls, operator):
    """Documents of one tile, which have no states, and of several."""
    given = [x if x.ndim == 1 else x[:1] for x in draw(operator)]
    documents = torch.tensor((0, 20, 100, 130, 200))
    found = gradients(given, cu_seqlens=documents)
    assert calls == ["early_gradients"] * 2 + ["late_gradients"] * 2
    expected = one_by_one(given, cu_seqlens=documents)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_they_are_not_asked_where_they_do_not_serve(calls, operator):
    """Heads that share, decays that are not learnt, and a method that makes something else of the kernels."""
    gradients(draw(operator, k_heads=2))
    gradients(draw(operator), method="lightning")
    q, k, v, do, g = draw(operator)
    q.requires_grad_()
    leetdist.linear_attention(q, k, v, g, tile=TILE).backward(do)
    assert not calls
    gradients(draw(operator))
    assert calls == ["early_gradients", "late_gradients"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_they_serve_what_follows_operations_too(calls, operator):
    """torch.func and torch.compile call ops, in whose forward nothing is known to be learnt."""
    *given, do, g = draw(operator)

    def loss(*leaves: Tensor) -> Tensor:
        return (leetdist.linear_attention(*leaves, tile=TILE) * do).sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*given, g)
    assert calls == ["early_gradients", "late_gradients"]
    assert all(torch.equal(x, y) for x, y in zip(found, one_by_one([*given, do, g]), strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_explain_names_them(calls, operator):
    q, k, v, _, g = draw(operator)
    said = str(leetdist.explain(q, k, v, g.requires_grad_(), tile=TILE))
    assert "gradient of q, gradients of k, v and log_decay by stand-in" in said
    assert not calls
