"""How a tile goes on where tokens come one after the other: its walk, and its own sum, moved on by some chunks.

The arithmetic is that of block.py, chunk after chunk, so the walk of a tile that is computed in parts is that of the
tile as a whole. leetdist.kernels.common.open_tiles says what is kept between the parts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch.walk import CHUNK, ConstantWalk, Walk, WalkOf, padded


def open_chunk(rows: int, columns: int, dtype: torch.dtype, tile: int) -> int:
    """Tokens of a chunk of a state of `rows` x `columns`."""
    return min(CHUNK, tile)


def left_out(log_decay: Tensor, tile: int) -> Tensor | None:
    """(H,) int64: tokens at the start of a full tile that its sum leaves out; None where it leaves out none."""
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
    walk_of: WalkOf | None = None,
) -> None:
    """Move on, in place, the state that a tile's walk carries, what the tile adds to the state and, for a decay a
    token, the sum of its log-decays.

    k: (B, Hk, n, Dk), v: (B, Hv, n, Dv), the tile's tokens from number `at` on, where a chunk begins (a number, or (B,)
    int64); the last chunk may be short. log_decay: (H,) or (B, H, n); walked, own: (B, H, Dk, Dv); total: (B, H) fp64.

    What is not finite in k or v is NaN in `walked`, of k in all columns: the outputs behind it in its tile are NaN.
    """
    walk: Walk[Any] = (walk_of or ConstantWalk)(Tiles(tile, (0, k.shape[2])), log_decay, k.dtype, False)
    states = [padded(x[:, :, None]) for x in (walked, own)]
    for chunk in walk:
        update = (chunk.take(k) * chunk.to_state()).mT @ chunk.take(v)
        for state in states:
            chunk.advance(state, update)
        if total is not None:
            total += chunk.total()[..., 0]
    rows, columns = walked.shape[2:]
    for to, state in zip((walked, own), states, strict=True):
        to.copy_(state[:, :, 0, :rows, :columns])
    if not math.isfinite(walked.sum()):
        walked.masked_fill_(lost_columns(k, v, walked.shape[1]), math.nan)


def lost_columns(k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, H, 1, Dv): where something is not finite: in a column of v, or in k."""
    lost_v = ~torch.isfinite(v).all(2, keepdim=True)
    lost_k = ~torch.isfinite(k).flatten(2).all(2)[..., None, None]
    lost_v, lost_k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (lost_v, lost_k))
    return lost_v | lost_k


def keep_of(total: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left, in the states' dtype, of the state before a tile whose log-decays sum up to `total`, fp64: the same
    rounding as `transitions`."""
    return total.exp().to(dtype)
