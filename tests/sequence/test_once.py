"""Second derivatives of what has none are refused, and never dropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import leetdist

B, C = (torch.randn(1, 20, 1, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
DT, A, D, W = torch.full((1, 20, 2), 0.3), -torch.ones(2), torch.ones(2), torch.ones(16, 4)


def scan(x: Tensor, **more: Any) -> Tensor:
    return leetdist.mamba_chunk_scan_combined(x.unflatten(2, (2, 8)), DT, A, B, C, **more)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mamba_chunk_scan_combined": scan,
    "mamba_chunk_scan_combined with D": lambda x: scan(x, D=D),
    "mamba_chunk_scan_combined with z": lambda x: scan(x, D=D, z=x.unflatten(2, (2, 8))),
    "causal_conv1d": lambda x: leetdist.nn.causal_conv1d(x, W, activation="silu"),
}


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_penalty_beside_a_loss(name: str, squared: bool) -> None:
    """PyTorch's once_differentiable finds no way from the penalty to x, and gives the gradient of the loss alone."""
    x = torch.randn(1, 20, 16, requires_grad=True)

    def loss() -> Tensor:
        y = CALLS[name](x)
        return (y.square() if squared else y).sum()

    (once,) = torch.autograd.grad(loss(), x)
    (first,) = torch.autograd.grad(loss(), x, create_graph=True)
    assert torch.equal(first, once)
    with pytest.raises(RuntimeError, match=f"({name.split()[0]}|linear_attention) can be differentiated once"):
        torch.autograd.grad(loss() + first.square().sum(), x)


@pytest.mark.parametrize("name", CALLS)
def test_a_penalty_on_gradients_that_vmap_has_taken(name: str) -> None:
    x = torch.randn(1, 20, 16, requires_grad=True)
    y = CALLS[name](x)
    several = torch.randn(2, *y.shape)

    def gradient(dy: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, dy, create_graph=True)[0]

    found = torch.func.vmap(gradient)(several)
    assert torch.equal(found, torch.stack([gradient(dy) for dy in several]))
    with pytest.raises(RuntimeError, match=f"({name.split()[0]}|linear_attention) can be differentiated once"):
        torch.autograd.grad(x.sum() + found.square().sum(), x)


@pytest.mark.parametrize("name", ["gather_sequence", "halo"])
def test_over_ranks(name: str) -> None:
    whole = torch.randn(1, 2, 40, 8)

    def on_a_rank(group: Any) -> str:
        x = leetdist.shard_sequence(whole, 2, group).clone().requires_grad_()
        call = leetdist.gather_sequence if name == "gather_sequence" else partial(leetdist.halo, width=3)
        (first,) = torch.autograd.grad(call(x, 2, group).square().sum(), x, create_graph=True)
        try:
            torch.autograd.grad(x.sum() + first.square().sum(), x)
        except RuntimeError as error:
            return str(error)
        return "dropped"

    for said in leetdist.virtual_ranks(on_a_rank, 2):
        assert f"{name} can be differentiated once" in said
