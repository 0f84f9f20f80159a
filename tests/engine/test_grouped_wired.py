"""Kernels that can add up gradients over heads that share one are told for how many heads these are wanted, and the
engine adds up what they leave; a stand-in in PyTorch does a part of it, or all."""

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
from leetdist.kernels.constant_decay.pytorch import block
from leetdist.operators.implementations import CANDIDATES, PYTORCH, Implementation

MODULE = "leetdist.kernels.constant_decay.stand_in"
TILE = 32


@pytest.fixture(params=[2, 4])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int | None]]:
    """For how many heads the stand-in was told; it adds up so many at a time."""
    heard: list[int | None] = []
    together: int = request.param

    def tile_outputs(
        *given: Any, out_dtype: torch.dtype, out: Tensor | None = None, heads: int | None = None, **options: Any
    ) -> Tensor:
        heard.append(heads)
        every = given[3].shape[1]
        if heads is None or every == heads:
            return block.tile_outputs(*given, out_dtype=out_dtype, out=out, **options)
        each = torch.zeros(given[0].shape[0], every, *given[2].shape[2:])
        block.tile_outputs(*given, out_dtype=out_dtype, out=each, **options)
        assert out is None or out.shape[1] == every // together
        total = each.unflatten(1, (-1, together)).sum(2)
        return total if out is None else out.add_(total)  # tiles of another kind are zeros there

    module = types.ModuleType(MODULE)
    module.tile_outputs = tile_outputs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    here = Implementation("stand-in", "stand_in", lambda facts: None)
    monkeypatch.setitem(CANDIDATES, "tile_outputs", (here,))
    forget_kernels()
    yield heard
    forget_kernels()


def gradients(given: list[Tensor], log_decay: Tensor, own: slice = slice(None), **options: Any) -> list[Tensor]:
    *leaves, do = (x[:, :, own] for x in given)
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = leetdist.linear_attention(*leaves, log_decay, tile=TILE, **options)
    return list(torch.autograd.grad(o, leaves, do))


@pytest.mark.parametrize("documents", [None, (0, 20, 100, 130, 200)])
def test_what_is_left_is_added_up(told, documents, monkeypatch):
    batch = 2 if documents is None else 1
    given, log_decay = [torch.randn(batch, heads, 200, 8) for heads in (8, 2, 2, 8)], -torch.rand(8)
    options: dict[str, Any] = {} if documents is None else {"cu_seqlens": torch.tensor(documents)}
    whole = gradients(given, log_decay, **options)
    assert set(told) == {None, 8, 2}  # outputs, dq, and dk and dv
    for ranks in (1, 3) if documents is None else ():
        bounds = {1: [0, 200], 3: [0, 64, 64, 200]}[ranks]

        def rank(group: Any, bounds: list[int] = bounds) -> list[Tensor]:
            own = slice(bounds[group.rank], bounds[group.rank + 1])
            return gradients(given, log_decay, own, group=group)

        parts = zip(*leetdist.virtual_ranks(rank, ranks), strict=True)
        assert all(torch.equal(torch.cat(x, 2), y) for x, y in zip(parts, whole, strict=True))
    monkeypatch.setitem(CANDIDATES, "tile_outputs", (PYTORCH,))
    forget_kernels()
    for x, y in zip(gradients(given, log_decay, **options), whole, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)
