"""FleetAttention's outputs in plain PyTorch: row of the state by row, parallel over tokens, tiles and columns.

Elementwise operations only, so the bits depend on nothing but the tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch.token_walk import TokenWalk
from leetdist.kernels.constant_decay.pytorch.walk import decay_powers


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
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs."""
    heads, walk = log_decay.shape[0], TokenWalk(tiles, a.device, reverse)
    dtype = states.dtype
    a_i, b_i, c_i = (walk.take(x, heads, dtype) for x in (a, b, c))
    sums = torch.zeros_like(c_i)
    gamma = decay_powers(log_decay, 1, dtype)[:, 1, None, None]
    start = states * (state_scale if reverse else state_scale * gamma[..., None])
    for row in range(a.shape[3]):
        added = b_i[..., row, None] * c_i * scale
        if added.numel():
            added[:, :, :, 0] += start[:, :, :, row]
        sums += a_i[..., row, None] * decayed_cumsum(added, log_decay)
    return walk.put(sums, a.shape[2], out_dtype, out)


def decayed_cumsum(x: Tensor, log_decay: Tensor) -> Tensor:
    """`y_t = sum_{u<=t} gamma^(t-u) x_u` over the second last dimension of (B, H, ..., T, D), by doubling.

    After the pass with distance d, every token has summed itself and the 2d - 1 before it: log2 T passes, each decaying
    by gamma^d. The textbook form, gamma^t times the cumulative sum of x_u / gamma^u, overflows.
    """
    distance = 1
    while distance < x.shape[-2]:
        power = torch.exp(log_decay.double() * distance).to(x.dtype)
        power = power.view(-1, *[1] * (x.ndim - 2))
        later = x[..., distance:, :] + x[..., :-distance, :] * power
        x = torch.cat((x[..., :distance, :], later), -2)
        distance *= 2
    return x
