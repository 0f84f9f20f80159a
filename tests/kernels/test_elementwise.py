"""Elementwise functions: right, and the same wherever a number lies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from leetdist.kernels.common import elementwise
from leetdist.reference import relative_error

FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": lambda x: x.clamp_min(0) + torch.log1p(torch.exp(-x.abs())),
    "silu_gradient": lambda x: torch.func.vmap(torch.func.grad(F.silu))(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_right_and_the_same_everywhere(name: str) -> None:
    function = getattr(elementwise, name)
    x = torch.cat((torch.randn(3001) * 4, torch.tensor([0.0, -0.0, 100.0, -100.0, 45.0, 20.0])))
    whole = function(x)
    assert relative_error(whole, FUNCTIONS[name](x.double())) < 2e-7
    assert torch.equal(torch.cat([function(x[i : i + 7]) for i in range(0, len(x), 7)]), whole)
    assert torch.equal(function(torch.stack((x, x), 1)[:, 0]), whole)
    if name == "silu":
        assert torch.equal(elementwise.silu_(x), whole)
        assert torch.equal(x, whole)


@pytest.mark.parametrize("name", ["sigmoid", "silu", "softplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-200.0, -3.0, 0.0, 2.0, 39.0, 41.0, 300.0], dtype=dtype, requires_grad=True)
    getattr(elementwise, name)(x).sum().backward()
    right = {"sigmoid": torch.sigmoid, "silu": F.silu, "softplus": F.softplus}[name]
    torch.testing.assert_close(x.grad, torch.func.vmap(torch.func.grad(right))(x.detach()))
