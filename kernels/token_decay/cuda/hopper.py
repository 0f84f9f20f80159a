"""The kernels for Hopper of kernels/constant_decay/cuda, with the weights of a decay a token (hopper_weights.cuh); and
where heads share operands, those of shared.py."""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.common.memory import heads_of
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper
from leetdist.kernels.constant_decay.cuda.hopper import configuration
from leetdist.kernels.token_decay.cuda import shared

__all__ = ["compile_for", "configuration", "tile_outputs", "tile_states"]


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
) -> Tensor:
    """See leetdist.kernels.token_decay.pytorch.block.tile_states."""
    whole = out is None or out.is_contiguous()
    compute = shared.shared_states if whole and shared.in_fours(b, c, log_decay, tiles) else hopper.tile_states
    return compute(b, c, log_decay, tiles, reverse=reverse, scale=scale, to_end=to_end, out=out)


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
) -> Tensor:
    """See leetdist.kernels.token_decay.pytorch.block.tile_outputs.

    Outputs in fp32 of bf16 heads that share c are wanted for their sum alone. Where no place is given and they come in
    pairs, they are added up, (B, fewer, N, Dc): over all that share, and rounded to bf16, or over some of them; other
    tiles may then be written there.
    """
    given = a, b, c, states, log_decay, tiles
    if onto is not None:
        options = {"reverse": reverse, "scale": scale, "state_scale": state_scale, "out_dtype": out_dtype}
        return hopper.tile_outputs(*given, out=out, onto=onto, **options)  # type: ignore[arg-type]
    if (out is None or out.shape[1] < heads_of(log_decay)) and shared.summed(a, c, log_decay, out_dtype):
        return shared.summed_outputs(*given, reverse=reverse, scale=scale, state_scale=state_scale, out=out)
    paired = out_dtype == a.dtype and shared.in_pairs(a, b, c, log_decay, tiles)
    compute = shared.paired_outputs if paired else hopper.tile_outputs
    return compute(*given, reverse=reverse, scale=scale, state_scale=state_scale, out_dtype=out_dtype, out=out)


def compile_for(
    step: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    wide: bool,
    reverse: bool,
    programs: int,
    device: torch.device,
    *,
    share: int = 1,
    onto: bool = False,
) -> None:
    """See leetdist.kernels.constant_decay.cuda.hopper.compile_for."""
    hopper.compile_for(step, rows, columns, dtype, wide, reverse, programs, device, share=share, token=True, onto=onto)
    if not onto:
        shared.compile_for(step, rows, columns, dtype, wide, reverse, programs, device, share)
