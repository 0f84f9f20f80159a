"""A scale other than 1, where a tile has several chunks: the reversed states hold it, the forward ones do not."""

from __future__ import annotations

import pytest
import torch

import leetdist
from leetdist.reference import quadratic, relative_error


@pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("triton", marks=[pytest.mark.interpreter, pytest.mark.gpu])],
)
@pytest.mark.parametrize("scale", [0.125, -3.0, 0.0])
def test_gradients_with_a_scale(backend, scale, monkeypatch):
    monkeypatch.setenv("LEETDIST_BACKEND", backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, do = (torch.randn(1, 2, 512, 16, device=device) for _ in range(4))
    log_decay = torch.tensor([-0.3, -0.004], device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = leetdist.linear_attention(*leaves, log_decay, scale=scale, tile=512)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected = quadratic(*doubles, log_decay, scale=scale)
    assert relative_error(o, expected) < 2e-6
    for got, want in zip(
        torch.autograd.grad(o, leaves, do),
        torch.autograd.grad(expected, doubles, do.double()),
        strict=True,
    ):
        assert relative_error(got, want) < 2e-6
