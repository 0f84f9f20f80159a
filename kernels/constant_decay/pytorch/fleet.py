"""FleetAttention's outputs in plain PyTorch: row of the state by row, parallel over tokens, tiles and columns.

Elementwise operations only, so the bits depend on nothing but the tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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
    powers_of: Callable[..., Powers] | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs. powers_of: what decays, if not (H,) decays."""
    heads, walk = states.shape[1], TokenWalk(tiles, a.device, reverse)
    dtype = states.dtype
    a_i, b_i, c_i = (walk.take(x, heads, dtype) for x in (a, b, c))
    sums = torch.zeros_like(c_i)
    powers = (powers_of or ConstantPowers)(log_decay, walk, dtype)
    start = states * (state_scale if reverse else state_scale * powers.first())
    for row in range(a.shape[3]):
        added = b_i[..., row, None] * c_i * scale
        if added.numel():
            added[:, :, :, 0] += start[:, :, :, row]
        sums += a_i[..., row, None] * decayed_cumsum(added, powers)
    return walk.put(sums, a.shape[2], out_dtype, out)


class Powers(Protocol):
    """The decay over a number of tokens of the walk."""

    def first(self) -> Tensor:
        """Of the first token, (B or 1, H, tiles or 1, 1, 1)."""

    def over(self, distance: int) -> Tensor:
        """Between each token that has one and the token `distance` before it, (B or 1, H, tiles or 1, tokens or 1, 1);
        asked for distances that double."""


class ConstantPowers:
    """Of (H,) decays."""

    def __init__(self, log_decay: Tensor, walk: TokenWalk, dtype: torch.dtype) -> None:
        self.log_decay, self.dtype = log_decay, dtype

    def first(self) -> Tensor:
        return decay_powers(self.log_decay, 1, self.dtype)[:, 1, None, None, None]

    def over(self, distance: int) -> Tensor:
        return torch.exp(self.log_decay.double() * distance).to(self.dtype)[:, None, None, None]


def decayed_cumsum(x: Tensor, powers: Powers) -> Tensor:
    """`y_t = sum_{u<=t} gamma^(t-u) x_u` over the second last dimension of (B, H, tiles, T, D), by doubling.

    After the pass with distance d, every token has summed itself and the 2d - 1 before it: log2 T passes, each decaying
    by gamma^d. The textbook form, gamma^t times the cumulative sum of x_u / gamma^u, overflows.
    """
    distance = 1
    while distance < x.shape[-2]:
        later = x[..., distance:, :] + x[..., :-distance, :] * powers.over(distance)
        x = torch.cat((x[..., :distance, :], later), -2)
        distance *= 2
    return x
