"""The gradient of a decay a token, number by number: a strong decay's is tiny, and right to its last digits all the
same, beside any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from leetdist import linear_attention
from leetdist.reference import recurrence


@pytest.mark.parametrize("strength", [1e-6, 0.1, 5.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_number_has_its_digits(strength: float, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 300, 16, dtype=dtype) for _ in range(3))
    do, dstate = torch.randn(1, 2, 300, 16, dtype=dtype), torch.randn(1, 2, 16, 16, dtype=dtype)
    steps = -strength * torch.rand(1, 2, 300, dtype=dtype)

    def gradient(call: Callable[..., Any], wide: torch.dtype, **options: bool) -> torch.Tensor:
        log_decay = steps.to(wide).requires_grad_()
        o, state = call(q.to(wide), k.to(wide), v.to(wide), log_decay, **options)
        (grad,) = torch.autograd.grad((o * do.to(wide)).sum() + (state * dstate.to(wide)).sum(), log_decay)
        return grad.double()

    got, want = gradient(linear_attention, dtype, return_state=True), gradient(recurrence, torch.float64)
    assert (got[..., 0] == 0).all()  # there is no state yet that it could keep
    error = ((got - want).abs() / want.abs())[..., 1:]
    # Where inner products of both signs nearly cancel, few digits are left of their sum.
    assert error.median() < (1e-6 if dtype == torch.float32 else 1e-13)
    assert error.max() < (1e-2 if dtype == torch.float32 else 1e-8)
