"""The local primitives of a decay a token in Triton: those of a constant decay
(leetdist.kernels.constant_decay.triton.block), with weights from sums of log-decays.

Where `log_decay` is wanted, the sums of `token_sums` do as well: who calls several of them makes them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.triton import block
from leetdist.kernels.constant_decay.triton.block import configuration
from leetdist.kernels.constant_decay.triton.fold import fold
from leetdist.kernels.token_decay.triton.gradient import decay_gradient
from leetdist.kernels.token_decay.triton.sums import sums_of, token_sums, transitions
from leetdist.kernels.token_decay.triton.weighted import weighted_values

__all__ = [
    "configuration",
    "decay_gradient",
    "fold",
    "tile_outputs",
    "tile_states",
    "token_sums",
    "transitions",
    "weighted_values",
]


def tile_states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float = 1.0,
    to_end: bool = True,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_states; log_decay: (B, H, N) fp32."""
    sums = sums_of(log_decay, tiles)
    return block.tile_states(
        b, c, sums, tiles, reverse=reverse, scale=scale, to_end=to_end, out=out, precision=precision
    )  # fmt: skip


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
    onto: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs; log_decay: (B, H, N) fp32."""
    return block.tile_outputs(
        a, b, c, states, sums_of(log_decay, tiles), tiles,
        reverse=reverse, scale=scale, state_scale=state_scale, out_dtype=out_dtype, out=out, onto=onto,
        precision=precision,
    )  # fmt: skip
