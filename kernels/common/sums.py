"""Sums of one fixed order."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from leetdist.kernels.runtime import triton_release
from leetdist.kernels.runtime.settings import settings


def sum_in_pairs(x: Tensor) -> Tensor:
    """The sum over the second last dimension as a tree, whose order, unlike torch.sum's, is the same everywhere."""
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        pairs = x[..., :half, :] + x[..., half : 2 * half, :]
        x = torch.cat((pairs, x[..., 2 * half :, :]), -2)
    return x[..., 0, :]


def tiles_joined(parts: tuple[Tensor, ...]) -> Tensor:
    """(B, H, tiles, ...) of one rank or two, as one, contiguous."""
    if len(parts) == 1 and parts[0].is_contiguous():
        return parts[0]
    if _launches(parts, parts[0].device):
        from leetdist.kernels.common import head_sums

        return head_sums.joined(parts)
    return torch.cat(parts, 2).contiguous()


def sum_of_tiles(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """(B, H, tiles, ...) of one rank or two (0 of none) folded in the order of the tiles, then over the batch, in fp64:
    (H, ...) as `like`. On a GPU by `sum_in_pairs`, whoever launches it."""
    if like.ndim == 1 and _launches(parts, like.device):
        from leetdist.kernels.common import head_sums

        return head_sums.add_up(parts, like)
    if not parts:
        return torch.zeros_like(like)
    ordered = tiles_joined(parts).transpose(0, 1).flatten(1, 2).double()
    if ordered.is_cuda:  # whose cumsum has no fixed order
        return sum_in_pairs(ordered.flatten(2) if ordered.ndim > 2 else ordered[..., None]).view_as(like).to(like.dtype)
    # cumsum, because a sum's order may depend on the number of threads, which launchers set.
    return ordered.cumsum(1)[:, -1].to(like.dtype)


def _launches(parts: tuple[Tensor, ...], device: torch.device) -> bool:
    """Whether Triton's kernels join and add up these."""
    if device.type != "cuda" or not all(x.ndim == 3 and x.dtype == torch.float64 for x in parts):
        return False
    return settings().backend != "torch" and _by_triton(device)


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
    return _by_triton(x.device)


def _by_triton(device: torch.device) -> bool:
    if device.type == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0)):
        return False
    return triton_release.why_not_triton() is None and _compiles(device)


@cache
def _compiles(device: torch.device) -> bool:
    """Tried once: there may be no C compiler."""
    from leetdist.kernels.common import shared_heads

    try:
        shared_heads.sum_shared(torch.zeros(1, 2, 1, 16, device=device), 1, torch.float32)
    except Exception:
        return False
    return True
