"""Lightning Attention-2: products inside blocks of fixed length, one state for each block.

Algorithm: a tile is cut into blocks of 256 tokens. What each block adds to the state is computed for all blocks at
once, a left fold inside each tile makes them the states at the blocks' starts, and then all blocks compute
`(Q K^T . M) V + gamma^i Q S` at once. Where `block` walks a tile as one program, this has as many as there are blocks:
for few heads or short tiles; the price is a state in memory every 256 tokens.
Time: O(N (C + D) D); memory: O(N / 256 x Dk Dv).
Backends: those of block, whose kernels it composes on the finer grid. Backward: its own, the same composition in both
directions of time; tile states and the gradient of log_decay are the block kernels'. Works under `group=`.

Source: Lightning Attention-2, arXiv 2401.04658, algorithm 1, with the loop over blocks made a scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.composition import Kernels
from leetdist.operators.cost import LIGHTNING_BLOCK as BLOCK

OUTPUTS = "tile_outputs"


@lru_cache(maxsize=512)
def composed(base: Kernels) -> Kernels:
    """The block kernels, with outputs on the finer grid."""
    return replace(base, tile_outputs=outputs_of(base), adds_up=False)


def outputs_of(base: Kernels) -> Callable[..., Tensor]:
    """`tile_outputs` of the block kernels on the finer grid."""

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
        if tiles.size > BLOCK:
            tiles, inside_tiles = tiles.finer(BLOCK)
            starts = states.transpose(1, 2).flatten(0, 1) * state_scale
            states = base.tile_states(b, c, log_decay, tiles, reverse=reverse, scale=scale)
            base.fold(states, starts, base.transitions(log_decay, inside_tiles), inside_tiles, reverse=reverse)
            state_scale = 1.0
        return base.tile_outputs(
            a, b, c, states, log_decay, tiles,
            reverse=reverse, scale=scale, state_scale=state_scale, out_dtype=out_dtype, out=out,
        )  # fmt: skip

    return tile_outputs
