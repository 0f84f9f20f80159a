"""Memory for what the kernels of a tile return."""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles


def heads_of(log_decay: Tensor) -> int:
    """Of (H,), or token by token (B, H, N, ...)."""
    return log_decay.shape[0 if log_decay.ndim == 1 else 1]


def empty_states(b: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles) -> Tensor:
    """(B, H, tiles, Db, Dc) fp32."""
    shape = b.shape[0], heads_of(log_decay), tiles.count, b.shape[3], c.shape[3]
    return torch.empty(shape, dtype=torch.float32, device=b.device)


def empty_outputs(a: Tensor, c: Tensor, log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N, Dc) laid out in memory as a is: a (B, N, H, D) model gets its own layout back."""
    batch, heads, tokens, dim = a.shape[0], heads_of(log_decay), a.shape[2], c.shape[3]
    if a.stride(1) < a.stride(2):
        return torch.empty(batch, tokens, heads, dim, dtype=dtype, device=a.device).transpose(1, 2)
    return torch.empty(batch, heads, tokens, dim, dtype=dtype, device=a.device)
