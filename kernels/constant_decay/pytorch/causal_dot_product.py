"""The recurrence in plain PyTorch: all tiles in step, one token after the other.

Elementwise operations only, so the bits depend on nothing but the tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leetdist.kernels.common.sums import sum_in_pairs
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch.token_walk import TokenWalk


def tile_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float,
    state_scale: float,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    decay_of: Callable[..., Decay] | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs. decay_of: what decays, if not (H,) decays."""
    heads, walk = states.shape[1], TokenWalk(tiles, a.device, reverse)
    a_i, b_i, c_i = (walk.take(x, heads, states.dtype) for x in (a, b, c))
    decay = (decay_of or Decay)(log_decay, walk, states.dtype)
    state = states * state_scale
    sums = torch.empty_like(c_i)
    for t in range(c_i.shape[3]):
        if not reverse:
            state = decay(state, t)
        state = state + b_i[..., t, :, None] * (c_i[..., t, None, :] * scale)
        sums[..., t, :] = sum_in_pairs(a_i[..., t, :, None] * state)
        if reverse:
            state = decay(state, t)
    return walk.put(sums, a.shape[2], out_dtype, out)


class Decay:
    """One token's decay of a state (B, H, tiles, Dk, Dv).

    gamma near 1 is rounded by up to 3e-8, the same way every time, and a thousand tokens would multiply that by a
    thousand. So a slow decay adds `state * (gamma - 1)`, whose factor has all its digits.
    """

    def __init__(self, log_decay: Tensor, walk: TokenWalk, dtype: torch.dtype) -> None:
        exact = self.steps(log_decay, walk).double()
        slow = exact > -0.7
        self.kept = slow.to(dtype)
        self.factor = torch.where(slow, torch.expm1(exact), torch.exp(exact)).to(dtype)

    def steps(self, log_decay: Tensor, walk: TokenWalk) -> Tensor:
        """The log-decay of each token of the walk, (B or 1, H, tiles or 1, steps or 1)."""
        return log_decay[None, :, None, None]

    def __call__(self, state: Tensor, t: int) -> Tensor:
        kept, factor = (x[..., t if x.shape[3] > 1 else 0, None, None] for x in (self.kept, self.factor))
        return state * kept + state * factor
