"""The kernels for Hopper of hopper.py, and beside them summed_outputs.cu: outputs that are wanted for their sum over
heads alone, as dk and dv of grouped heads are, where heads of 128 share the operand a."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.blocks import taking
from leetdist.kernels.common.memory import empty_outputs, heads_of
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper, launches
from leetdist.kernels.constant_decay.cuda.hopper import configuration, tile_states
from leetdist.kernels.constant_decay.cuda.operands import operand_arguments, tile_arguments
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.runtime import cuda_launch

__all__ = ["compile_for", "configuration", "tile_outputs", "tile_states"]

SIZE, GROUPS = 128, 2  # of a head, and heads of a block, each of them a warpgroup's


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
    heads: int | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.cuda.hopper.tile_outputs. heads: of the sum that the outputs are wanted for;
    where no place is given, they may be added up in part, (B, fewer, N, Dc) fp32, or all, rounded to a's dtype, and
    other tiles then be written there."""
    given = a, b, c, states, log_decay, tiles
    together = added_up(a, c, log_decay, heads, out_dtype)
    fewer = out is None or (out.ndim > 1 and out.shape[1] < heads_of(log_decay))
    if heads is not None and together > 1 and fewer:
        options: dict[str, Any] = {"reverse": reverse, "scale": scale, "state_scale": state_scale, "out": out}
        return summed_outputs(*given, together=together, heads=heads, **options)
    return hopper.tile_outputs(
        *given, reverse=reverse, scale=scale, state_scale=state_scale, out_dtype=out_dtype, out=out, onto=onto
    )


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
    hopper.compile_for(step, rows, columns, dtype, wide, reverse, programs, device, share=share, onto=onto)
    if step == "tile_outputs" and wide and rows == columns == SIZE and share % GROUPS == 0:
        cluster = 1 if share % 4 else 2
        for name in launches.OUTPUTS:
            _kernel(name, cluster, dtype, share != 4, reverse, device)


def added_up(a: Tensor, c: Tensor, log_decay: Tensor, heads: int | None, out_dtype: torch.dtype) -> int:
    """How many heads a launch adds up, of outputs that are wanted in fp32 for their sum, (B, heads, N, Dc): four, two,
    or one that does not. The association of the sum, which depends on sizes and numbers of heads alone."""
    if heads is None or out_dtype == a.dtype or (a.shape[3], c.shape[3]) != (SIZE, SIZE):
        return 1
    every = heads_of(log_decay)
    return next(n for n in (4, 2, 1) if not (every // heads % n or every // a.shape[1] % n))


def summed_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    together: int,
    heads: int,
    reverse: bool,
    scale: float,
    state_scale: float,
    out: Tensor | None,
) -> Tensor:
    """Those of leetdist.kernels.constant_decay.pytorch.block.tile_outputs, `together` heads added up: (B, H / together,
    N, 128), in a's dtype where nothing is left to be added up for `heads`, by two blocks, and else in fp32. In `out`,
    which an earlier call has returned, if given."""
    every, cluster = heads_of(log_decay), together // GROUPS
    wide = cluster == 1 or every // together != heads
    if out is None:
        out = empty_outputs(a, c, log_decay[::together], torch.float32 if wide else a.dtype)
    if not out.numel():
        return out
    blocks = a.shape[0] * every // GROUPS * tiles.count
    again = torch.empty(blocks, dtype=torch.int32, device=a.device)  # written by every block
    kept: list[Tensor] = []
    place = tile_arguments(tiles, log_decay, cluster, a, b, c)
    arguments = (
        *(x for operand in (a, b, c) for x in operand_arguments(operand, every, kept)),
        states.data_ptr(), *states.stride(), out.data_ptr(), *out.stride()[:3],
        *place[:2], every // together, *place[3:],
        float(scale), float(state_scale), scale_of_added(float(scale), float(state_scale)), again.data_ptr(),
    )  # fmt: skip
    for name in launches.OUTPUTS:
        launch = _kernel(name, cluster, a.dtype, wide, reverse, a.device)
        launch((blocks,), GROUPS * launches.THREADS, *arguments)
    return out


def shared_memory(name: str, cluster: int) -> int:
    """Bytes that a block asks for: two chunks of a, and of b and c of each head; scores; what is handed over, and what
    is sent."""
    operands = 2 * (SIZE + GROUPS * 2 * SIZE) // 64 * launches.BLOCK
    numbers = 64 * 64 * 4
    lost = 4 * (SIZE + 4) if name == launches.AGAIN else 0
    tables = GROUPS * (launches.TABLES["tile_outputs"][False] + lost)
    return operands + GROUPS * launches.BLOCK + numbers * cluster + tables + launches.BARRIERS


def defines(name: str, cluster: int, dtype: torch.dtype, wide: bool, reverse: bool) -> tuple[tuple[str, int], ...]:
    """What a kernel is compiled with."""
    return *launches.defines(name, SIZE, SIZE, GROUPS, dtype, wide, reverse), ("CLUSTER", cluster)


@cache
def _kernel(
    name: str, cluster: int, dtype: torch.dtype, wide: bool, reverse: bool, device: torch.device
) -> cuda_launch.Kernel:
    return cuda_launch.kernel(
        "constant_decay/cuda/summed_outputs.cu", "summed_outputs", device, defines(name, cluster, dtype, wide, reverse),
        shared_memory=shared_memory(name, cluster), features="a",
    )  # fmt: skip
