"""Tiles side by side, for methods that walk all of them in step, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch.reused import reused


class TokenWalk:
    """The order in which all tiles are walked: token `w` of the walk is row `rows[tile, w]`, unless `outside`."""

    def __init__(self, tiles: Tiles, device: torch.device, reverse: bool) -> None:
        self.reverse = reverse
        self.rows, self.outside, self.inside, self.where = reused(_order, tiles.num_tokens, device, tiles, reverse)

    def take(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """(B, Hx, N, D) as (B, heads, tiles, steps, D) in the walk's order; zero where a tile has no more tokens."""
        taken = x.index_select(2, self.rows.flatten()).to(dtype).unflatten(2, self.inside.shape)
        taken = taken.masked_fill(self.outside, 0)
        return taken if x.shape[1] == heads else taken.repeat_interleave(heads // x.shape[1], 1)

    def put(self, x: Tensor, tokens: int, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """The way back: (B, H, tiles, steps, D) as (B, H, tokens, D), in `out` if given."""
        if out is None:
            out = x.new_empty(*x.shape[:2], tokens, x.shape[-1], dtype=dtype)
        out[:, :, self.where] = x[:, :, self.inside].to(out.dtype)
        return out


def _order(device: torch.device, tiles: Tiles, reverse: bool) -> Iterator[Tensor]:
    """(tiles, steps) rows, (tiles, steps, 1) outside, its opposite (tiles, steps), and the rows that are inside."""
    table = tiles.table(device)
    start, length = table[:, :1], table[:, 1:]
    step = torch.arange(int(max((n for _, n in tiles.spans), default=0)), device=device)
    inside = step < length
    at = torch.minimum(step, length - 1)
    rows = start + (length - 1 - at if reverse else at)
    yield from (rows, ~inside[..., None], inside, rows[inside])
