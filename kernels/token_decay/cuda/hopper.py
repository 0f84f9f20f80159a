"""The kernels for Hopper of kernels/constant_decay/cuda, with the weights of a decay a token (hopper_weights.cuh); and
where heads share operands, those of shared.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.blocks import taking
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
    weight: Tensor | None = None,
) -> Tensor:
    """See leetdist.kernels.token_decay.pytorch.block.tile_states. weight: of c's tokens, where c is v."""
    options: dict[str, Any] = {"reverse": reverse, "scale": scale, "to_end": to_end, "out": out}
    if (out is None or out.is_contiguous()) and shared.in_fours(b, c, log_decay, tiles, weighted=weight is not None):
        return shared.shared_states(b, c, log_decay, tiles, weight=weight, **options)
    return hopper.tile_states(b, weighted(c, weight), log_decay, tiles, **options)


@taking(hopper.between)
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
    weight: Tensor | None = None,
    skip: Tensor | None = None,
    heads: int | None = None,
) -> Tensor:
    """See leetdist.kernels.token_decay.pytorch.block.tile_outputs. weight: of v's tokens, which is c; or, of outputs
    that are added up, b, and reversed a. skip: (H,) or (H, Dc), beside a weight, that times c itself is added, too; of
    heads that can come in pairs (leetdist.operators.refusals.cuda_hopper_weights).

    Outputs in fp32 of bf16 heads that share c are wanted for their sum alone, for so many `heads` (c's, if not told).
    Where no place is given and they come in pairs, they are added up, (B, fewer, N, Dc): over all that share, and
    rounded to bf16, or over some of them; other tiles may then be written there.
    """
    options: dict[str, Any] = {"reverse": reverse, "scale": scale, "state_scale": state_scale, "out": out}
    of_tiles = states, log_decay, tiles
    within = heads is None or c.shape[1] % heads == 0  # q and k may have more heads the one than the other
    added = within and (out is None or (out.ndim > 1 and out.shape[1] < heads_of(log_decay)))
    if onto is None and added and shared.summed(a, c, log_decay, out_dtype):
        return shared.summed_outputs(a, b, c, *of_tiles, weight=weight, **options)
    options["out_dtype"] = out_dtype
    alike = onto is None and out_dtype == a.dtype
    if alike and (skip is not None or shared.in_pairs(a, b, c, log_decay, tiles, weighted=weight is not None)):
        return shared.paired_outputs(a, b, c, *of_tiles, weight=weight, skip=skip, **options)
    return hopper.tile_outputs(a, b, weighted(c, weight), *of_tiles, onto=onto, **options)


def weighted(v: Tensor, weight: Tensor | None) -> Tensor:
    """v times its weights, for kernels that do not make the product themselves."""
    if weight is None:
        return v
    from leetdist.kernels.token_decay.triton.weighted import weighted_values

    return weighted_values(v, weight)


def compile_for(
    step: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    wide: int,
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
