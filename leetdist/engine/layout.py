"""How (B, heads, N, D) tensors lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.arguments import is_memory


def strides_as(x: Tensor, heads: int, dim: int) -> tuple[int, int, int, int]:
    """Of `empty_as`'s tensor."""
    tokens = max(1, x.shape[2])
    if x.stride(1) < x.stride(2):
        return tokens * heads * dim, dim, heads * dim, 1
    return heads * tokens * dim, tokens * dim, dim, 1


def empty_as(x: Tensor, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, heads, N, dim), laid out in memory as x is: a (B, N, H, D) model gets its own layout back."""
    batch, _, tokens, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    return x.new_empty(batch, heads, tokens, dim, dtype=dtype)


def row_major(x: Tensor) -> Tensor:
    """x with its values in memory as they are (a view can stand for their negatives) and a contiguous last dimension;
    any other strides are served as they are."""
    if type(x) is Tensor and x.is_contiguous() and not x.is_neg():  # most are, and each question takes the host time
        return x
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter and is_memory(x):
        x = x.as_subclass(Tensor)
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, one number after the other."""
    x = row_major(x)
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()
