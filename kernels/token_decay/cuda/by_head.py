"""All gradients of a decay a head that is learnt, by the two passes of a decay a token
(kernels/token_decay/cuda/gradients.cu), heads of 128 in bf16.

A decay a head is one that all of its tokens have, and its gradient is the sum of theirs. But the passes take what
crosses a chunk from what crosses the chunk before, and lose a little each time. That keeps one sign for long, so that
the sum over tokens does not cancel it: a head's gradient is off by up to 8e-4 in tiles of 4,096 tokens, and by 2e-2 in
tiles of 16,384, which are refused.
"""

from __future__ import annotations

from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.token_decay.cuda import gradients
from leetdist.kernels.token_decay.cuda.gradients import compile_for, configuration

__all__ = ["compile_for", "configuration", "early_gradients", "late_gradients"]

BY_TOKEN = "log_decay of tokens"


def early_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As leetdist.kernels.token_decay.cuda.gradients.early_gradients, of log_decay (H,)."""
    from leetdist.kernels.token_decay.triton.by_head import of_tokens

    decays = of_tokens(log_decay, q.shape[2]).expand(q.shape[0], -1, -1)
    dq, kept = gradients.early_gradients(q, k, v, do, states, decays, tiles, scale=scale, out=out)
    return dq, {**kept, BY_TOKEN: decays}


def late_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    ends: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    kept: dict[str, Tensor],
    *,
    scale: float,
    outs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """As leetdist.kernels.token_decay.cuda.gradients.late_gradients; of log_decay, what each tile adds to its gradient:
    (B, H, tiles.count) fp64."""
    from leetdist.kernels.token_decay.triton.by_head import of_tiles

    dk, dv, grad = gradients.late_gradients(
        q, k, v, do, states, ends, kept[BY_TOKEN], tiles, kept, scale=scale, outs=(outs[0], outs[1], None)
    )
    return dk, dv, of_tiles(grad, tiles)
