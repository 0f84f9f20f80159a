"""How a tile with a decay a token goes on inside, in Triton: that of a constant decay, with sums for decays."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.triton import open_chunk as constant
from leetdist.kernels.runtime.triton_launch import launch
from leetdist.kernels.token_decay.triton.sums import LEAST, UNIT, sums_of

open_chunk = constant.open_chunk


def left_out(log_decay: Tensor, tile: int) -> Tensor | None:
    """Nothing: who says what later tokens forget?"""
    return None


def advance(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    walked: Tensor,
    own: Tensor,
    total: Tensor | None,
    *,
    tile: int,
    at: int | Tensor,
) -> None:
    """See constant_decay.pytorch.open_chunk.advance; log_decay: (B, H, n) fp32."""
    sums = sums_of(log_decay, Tiles(tile, (0, k.shape[2])))
    constant.advance(k, v, sums, walked, own, None, tile=tile, at=at)
    if total is not None:
        total += counted(log_decay)


def counted(log_decay: Tensor) -> Tensor:
    """(B, H) fp64: log-decays (B, H, n) summed as sums.py does, in units that make every order exact as long as exp of
    the sum is not 0."""
    units = (log_decay.clamp_min(LEAST.value).double() / UNIT.value).long().sum(-1)
    return (units.double() * UNIT.value).masked_fill(~(log_decay <= 0).all(-1), math.nan)


def keep_of(total: Tensor, dtype: torch.dtype) -> Tensor:
    """See constant_decay.pytorch.open_chunk.keep_of."""
    keep = torch.empty(total.shape, dtype=dtype, device=total.device)
    launch(_exp, (keep.numel(),), (total.contiguous(), keep), {})
    return keep


@triton.jit
def _exp(total, keep):
    program = tl.program_id(0).to(tl.int64)
    tl.store(keep + program, tl.exp(tl.load(total + program)).to(tl.float32))
