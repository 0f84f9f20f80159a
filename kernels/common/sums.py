"""Sums of one fixed order."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from leetdist.kernels.common import release
from leetdist.kernels.common.settings import settings


def sum_in_pairs(x: Tensor) -> Tensor:
    """The sum over the second last dimension as a tree, whose order, unlike torch.sum's, is the same everywhere."""
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        pairs = x[..., :half, :] + x[..., half : 2 * half, :]
        x = torch.cat((pairs, x[..., 2 * half :, :]), -2)
    return x[..., 0, :]


def sum_shared(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(B, H, N, ...) summed over the heads that share one of `heads`, in their order, and then rounded to `dtype`:
    (B, heads, N, ...). The bits are the same whoever adds them up."""
    if x.shape[1] == heads:
        return x.to(dtype)
    if _fused(x, dtype):
        from leetdist.kernels.common import shared_heads

        return shared_heads.sum_shared(x, heads, dtype)
    shared = x.unflatten(1, (heads, -1)).unbind(2)
    total = shared[0]
    for x in shared[1:]:
        total = total + x
    return total.to(dtype)


def _fused(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether Triton's kernel adds up, which reads everything once."""
    if x.ndim != 4 or x.dtype != torch.float32 or type(x) is not Tensor:
        return False
    given = settings()
    if given.backend == "torch" or not (x.device.type == "cuda" or (given.backend == "triton" and given.interpreted)):
        return False
    if x.device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(x.device) < (8, 0)
    ):
        return False
    return release.why_not_triton() is None and _compiles(x.device)


@cache
def _compiles(device: torch.device) -> bool:
    """Tried once: there may be no C compiler."""
    from leetdist.kernels.common import shared_heads

    try:
        shared_heads.sum_shared(torch.zeros(1, 2, 1, 16, device=device), 1, torch.float32)
    except Exception:
        return False
    return True
