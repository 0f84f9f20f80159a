"""Sums of one fixed order: the same bits whoever adds up."""

from __future__ import annotations

import pytest
import torch

from leetdist.kernels.common.sums import sum_shared

shared_heads = pytest.importorskip("leetdist.kernels.common.shared_heads")
GPU = torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(("heads", "share", "dim"), [(2, 3, 64), (1, 8, 40), (3, 2, 128)])
def test_triton_adds_up_in_the_order_of_the_heads(heads, share, dim, by_token):
    device = "cuda" if GPU else "cpu"
    x = torch.randn(2, 70, heads * share, dim) * 10.0 ** torch.randint(-4, 5, (2, 70, heads * share, dim))
    x = x.to(device).transpose(1, 2)
    if not by_token:
        x = x.contiguous()
    expected = x[:, ::share]
    for i in range(1, share):
        expected = expected + x[:, i::share]
    for dtype in (torch.float32, torch.bfloat16 if GPU else torch.float16):
        for found in (sum_shared(x, heads, dtype), shared_heads.sum_shared(x, heads, dtype)):
            assert torch.equal(found, expected.to(dtype))
        assert heads == 1 or (found.stride(1) < found.stride(2)) == by_token
