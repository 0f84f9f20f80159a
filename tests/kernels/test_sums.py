"""Sums of one fixed order: the same bits whoever adds up."""

from __future__ import annotations

import pytest
import torch

from leetdist.kernels.common.sums import sum_in_pairs, sum_shared

shared_heads = pytest.importorskip("leetdist.kernels.common.shared_heads")
head_sums = pytest.importorskip("leetdist.kernels.common.head_sums")
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


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("counts", [(1,), (2,), (7,), (300,), (3, 1), (0, 5), (5, 260), (256, 257)])
@pytest.mark.parametrize("batch", [1, 3])
def test_triton_adds_tiles_up_in_pairs(batch, counts):
    """Of one rank or two, the first a part of something wider: the tree of `sum_in_pairs`, entry after entry."""
    device = "cuda" if GPU else "cpu"
    wide = [torch.randn(batch, 2, n, 3, dtype=torch.float64) * 10.0 ** torch.randint(-4, 5, (n, 3)) for n in counts]
    parts = tuple(x[..., 1].to(device) for x in wide)
    parts = (*parts[:1], *(x.contiguous() for x in parts[1:]))
    whole = torch.cat(parts, 2)
    joined = head_sums.joined(parts)
    assert torch.equal(joined, whole)
    assert joined.is_contiguous()
    expected = sum_in_pairs(whole.transpose(0, 1).flatten(1, 2)[..., None])[..., 0]
    for dtype in (torch.float32, torch.float64):
        like = torch.empty(2, dtype=dtype, device=device)
        assert torch.equal(head_sums.add_up(parts, like), expected.to(dtype))
        assert torch.equal(head_sums.add_up((), like), torch.zeros_like(like))


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("blocks", [1, 4])
def test_triton_adds_blocks_in_order(blocks):
    decay = pytest.importorskip("leetdist.kernels.constant_decay.triton.decay")
    x = torch.randn(2, 3, 100, blocks, dtype=torch.float64) * 10.0 ** torch.randint(-4, 5, (blocks,))
    expected = x[..., 0]
    for block in range(1, blocks):
        expected = expected + x[..., block]
    assert torch.equal(decay._over_blocks(x.to("cuda" if GPU else "cpu")).cpu(), expected)
