"""The kernels for Hopper of kernels/constant_decay/cuda, with the weights of a decay a token (hopper_weights.cuh), and
outputs of heads that share an operand, added up in pairs (summed_outputs.cu)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from leetdist.kernels.common import loader
from leetdist.kernels.common.memory import empty_outputs, heads_of
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper
from leetdist.kernels.constant_decay.cuda.hopper import configuration, tile_states
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added

__all__ = ["compile_for", "configuration", "tile_outputs", "tile_states"]

ROWS = 64  # of the states of two heads, which are as large as one of 128 x 128


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
    """See leetdist.kernels.token_decay.pytorch.block.tile_outputs.

    Outputs in fp32 of bf16 heads that share c are wanted for their sum alone. Where no place is given and they come in
    pairs, (B, H / 2, N, Dc) are returned, which add up to the same; other tiles may then be written there.
    """
    options = {"reverse": reverse, "scale": scale, "state_scale": state_scale, "out": out}
    if (out is None or out.shape[1] < heads_of(log_decay)) and _summed(a, c, log_decay, out_dtype):
        return _summed_outputs(a, b, c, states, log_decay, tiles, **options)  # type: ignore[arg-type]
    return hopper.tile_outputs(a, b, c, states, log_decay, tiles, out_dtype=out_dtype, **options)  # type: ignore[arg-type]


def compile_for(
    step: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    wide: bool,
    reverse: bool,
    programs: int,
    device: torch.device,
) -> None:
    """See leetdist.kernels.constant_decay.cuda.hopper.compile_for."""
    hopper.compile_for(step, rows, columns, dtype, wide, reverse, programs, device, token=True)
    if step == "tile_outputs" and wide and rows == ROWS and dtype == torch.bfloat16:
        held, _, _ = hopper.shares(programs // 2, rows, columns, hopper._multiprocessors(device))
        for name in hopper.OUTPUTS:
            _kernel(name, held, reverse, device)


def _summed(a: Tensor, c: Tensor, log_decay: Tensor, out_dtype: torch.dtype) -> bool:
    share = heads_of(log_decay) // c.shape[1]
    return out_dtype == torch.float32 and a.dtype == torch.bfloat16 and a.shape[3] == ROWS and share % 2 == 0


def _summed_outputs(
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
    out: Tensor | None,
) -> Tensor:
    heads = heads_of(log_decay)
    out = empty_outputs(a, c, log_decay[:, ::2], torch.float32) if out is None else out
    if not out.numel():
        return out
    kept: list[Tensor] = []
    programs = a.shape[0] * (heads // 2) * tiles.count
    columns, _, splits = hopper.shares(programs, ROWS, c.shape[3], hopper._multiprocessors(c.device))
    again = torch.empty(programs * splits, dtype=torch.int32, device=a.device)  # written by every block
    operands = [hopper._operand(x, heads, kept) for x in (a, b, c)]
    *place, together = hopper._tiles(tiles, log_decay, splits, a, b, c)
    place[2] = heads // 2
    for name in hopper.OUTPUTS:
        launch = _kernel(name, columns, reverse, a.device)
        launch(
            (programs * splits,), hopper.THREADS,
            *operands[0], *operands[1], *operands[2], states.data_ptr(), *states.stride(),
            out.data_ptr(), *out.stride()[:3], *place, together // 2 if together % 2 == 0 else 1,
            float(scale), float(state_scale), scale_of_added(float(scale), float(state_scale)), again.data_ptr(),
        )  # fmt: skip
    return out


def shared_memory(name: str, columns: int) -> int:
    """Bytes that a block of summed_outputs.cu asks for."""
    lost = 4 * (columns + 4) if name == hopper.AGAIN else 0
    operands = 2 * (2 * 2 * ROWS + columns) // 64 * hopper.BLOCK
    tables = 2 * hopper.TABLES["tile_outputs"][True] + 2 * 2 * hopper.SLOT
    return operands + hopper.BLOCK + hopper.BARRIERS + tables + lost


@cache
def _kernel(name: str, columns: int, reverse: bool, device: torch.device) -> loader.Kernel:
    made = hopper.defines(name, ROWS, columns, 1, torch.bfloat16, True, reverse, True)
    return loader.kernel(
        "token_decay/cuda/summed_outputs.cu", "summed_outputs", device, made,
        shared_memory=shared_memory(name, columns), features="a",
    )  # fmt: skip
