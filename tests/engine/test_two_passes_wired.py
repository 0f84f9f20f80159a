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
from leetdist.engine import plan
from leetdist.kernels.token_decay.pytorch import block
from leetdist.operators.implementations import CANDIDATES, Facts, Implementation
from leetdist.operators.methods import _kernels_for

MODULE = "leetdist.kernels.token_decay.stand_in"
TILE = 32


def early_gradients(q, k, v, do, states, log_decay, tiles, *, scale, out):
    options: dict[str, Any] = {"reverse": False, "scale": scale, "state_scale": scale, "out_dtype": q.dtype}
    dq = block.tile_outputs(do, v, k, states.mT, log_decay, tiles, out=out, **options)
    return dq, {"sum_of_do": do.sum(dim=(2, 3))}


def late_gradients(q, k, v, do, states, ends, log_decay, tiles, kept, *, scale, outs):
    assert torch.equal(kept["sum_of_do"], do.sum(dim=(2, 3)))  # this lane's, and no other's
    options: dict[str, Any] = {"reverse": True, "scale": scale, "state_scale": 1.0, "out_dtype": q.dtype}
    dk = block.tile_outputs(v, do, q, ends.mT, log_decay, tiles, out=outs[0], **options)
    dv = block.tile_outputs(k, q, do, ends, log_decay, tiles, out=outs[1], **options)
    grad = block.decay_gradient(q, k, v, do, states, ends, log_decay, tiles, scale=scale)
    return dk, dv, grad if outs[2] is None else outs[2].copy_(grad)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Steps that the stand-in was asked for, in their order."""
    asked: list[str] = []
    module = types.ModuleType(MODULE)

    def counted(name: str, function: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return function(*args, **kwargs)

        return step

    for function in (early_gradients, late_gradients):
        monkeypatch.setattr(module, function.__name__, counted(function.__name__, function), raising=False)
    monkeypatch.setitem(sys.modules, MODULE, module)

    def refusal(facts: Facts) -> str | None:
        return None if facts.shares == (1, 1, 1) else "heads that share nothing"

    here = Implementation("stand-in", "stand_in", refusal, operator="token_decay")
    for step in ("early_gradients", "late_gradients"):
        monkeypatch.setitem(CANDIDATES, step, (here,))
    forget()
    yield asked
    forget()


def forget() -> None:
    """Who computes a kind of call is remembered."""
    _kernels_for.cache_clear()
    plan._plans.clear()


def gradients(given: list[Tensor], own: slice = slice(None), **options: Any) -> list[Tensor]:
    q, k, v, do, g = (x[:, :, own] for x in given)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
    o = leetdist.linear_attention(*leaves, tile=TILE, **options)
    return list(torch.autograd.grad(o, leaves, do))


def draw(heads: int = 4, k_heads: int = 4) -> list[Tensor]:
    q, k, v, do = (torch.randn(2, own, 200, 8) for own in (heads, k_heads, heads, heads))
    return [q, k, v, do, -torch.rand(2, heads, 200)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_the_first_leaves_reaches_the_second(calls, ranks):
    given, bounds = draw(), {1: [0, 200], 3: [0, 64, 64, 200]}[ranks]

    def rank(group: Any) -> list[Tensor]:
        return gradients(given, slice(bounds[group.rank], bounds[group.rank + 1]), group=group)

    found = [torch.cat(parts, 2) for parts in zip(*leetdist.virtual_ranks(rank, ranks), strict=True)]
    assert {"early_gradients", "late_gradients"} == set(calls)
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        for step in ("early_gradients", "late_gradients"):
            patch.setitem(CANDIDATES, step, ())
        forget()
        one_by_one = gradients(given)
    assert not calls
    assert all(torch.equal(x, y) for x, y in zip(found, one_by_one, strict=True))


def test_they_are_not_asked_where_they_do_not_serve(calls):
    """Heads that share, decays that are not learnt, and a method that makes something else of the kernels."""
    gradients(draw(k_heads=2))
    gradients(draw(), method="lightning")
    q, k, v, do, g = draw()
    q.requires_grad_()
    leetdist.linear_attention(q, k, v, g, tile=TILE).backward(do)
    assert not calls
    gradients(draw())
    assert calls == ["early_gradients", "late_gradients"]


def test_explain_names_them(calls):
    q, k, v, _, g = draw()
    said = str(leetdist.explain(q, k, v, g.requires_grad_(), tile=TILE))
    assert "gradient of q, gradients of k, v and log_decay by stand-in" in said
    assert not calls
