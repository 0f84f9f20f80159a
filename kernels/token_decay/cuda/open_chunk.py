"""Open tiles on Hopper with a decay a token: constant_decay/cuda/open_chunk.cu with the weights of open_weights.cuh."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from leetdist.kernels.constant_decay.cuda import open_chunk as constant
from leetdist.kernels.constant_decay.cuda.open_chunk import Kept, held, open_chunk, open_steps, steps_serve
from leetdist.kernels.token_decay.cuda.hopper import tile_outputs
from leetdist.kernels.token_decay.triton.open_chunk import counted, keep_of, left_out

__all__ = ["Kept", "advance", "held", "keep_of", "left_out", "open_chunk", "open_piece", "open_steps", "steps_serve"]

open_piece = partial(constant.open_piece, tile_outputs=tile_outputs)


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
    """See leetdist.kernels.constant_decay.pytorch.open_chunk.advance."""
    constant.advance(k, v, log_decay, walked, own, total, tile=tile, at=at)
    if total is not None:
        total += counted(log_decay)
