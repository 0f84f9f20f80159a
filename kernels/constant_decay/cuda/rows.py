"""Outputs of whole sequences of short tiles on Hopper: row_outputs.cu walks a sequence tile by tile, and the states
between tiles stay in registers. The bits are those of tile states, fold and outputs one after the other; shapes are as
in constant_decay.pytorch.block."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from leetdist.kernels.common.memory import empty_outputs, heads_of, zero_states
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.cuda import hopper, launches
from leetdist.kernels.constant_decay.cuda.hopper import configuration
from leetdist.kernels.constant_decay.cuda.launches import Part
from leetdist.kernels.constant_decay.cuda.operands import operand_arguments, tile_arguments
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.runtime.tensor_map import map_of

__all__ = ["compile_for", "configuration", "row_outputs"]


def row_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    transposed: bool,
    scale: float,
    state_scale: float,
    sum_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """(B, H, N, Dc) in a's dtype: `tile_outputs` of a, b, c from the states that `fold` makes of `tile_states` of b and
    c, times `sum_scale`. Each segment of `tiles` is a sequence that begins (`reverse`: ends) with a state of zero, its
    tiles of 16, 32, 64 or another power of two. transposed: the states are those of c and b, transposed, and the last
    bits theirs. Forward, scale and state_scale are one: a first tile's own sum is the next one's state."""
    if not reverse and scale != state_scale:
        raise ValueError(f"row_outputs: got a scale of {scale}, a state_scale of {state_scale}; forward they are one")
    if out is None:
        out = empty_outputs(a, c, log_decay, a.dtype)
    one, several = tiles.up_to(tiles.size)
    heads, size = heads_of(log_decay), (a.shape[3], c.shape[3])
    if one.count:
        zeros = zero_states((a.shape[0], heads, one.count, *size), torch.float32, a.device)
        hopper.tile_outputs(
            a, b, c, zeros, log_decay, one, reverse=reverse, scale=scale, state_scale=state_scale,
            out_dtype=a.dtype, out=out,
        )  # fmt: skip
    rows = several.whole
    programs = a.shape[0] * heads * rows.count
    if not programs or not out.numel():
        return out
    kept: list[Tensor] = []
    target = out
    if map_of(out) is None:
        target = out.clone(memory_format=torch.contiguous_format)  # which other tiles have written to
    operands = (x for operand in (a, b, c) for x in operand_arguments(operand, heads, kept))
    places = *operands, map_of(target), target.data_ptr(), *target.stride()[:3]
    for part in parts(programs, *size, tiles.size, cuda_launch.multiprocessors(c.device)):
        blocks, long = programs * part.splits, tiles.size > launches.CHUNK
        again = torch.empty(blocks, dtype=torch.int32, device=a.device)  # written by every block
        held = ceil_div(size[0], 64) * 64 * part.columns
        starts = torch.empty(blocks, held, dtype=torch.float32, device=a.device) if long else None
        arguments = (
            *places, *tile_arguments(rows, log_decay, part.splits, a, b, c),
            float(scale), float(state_scale), float(sum_scale), scale_of_added(float(scale), float(state_scale)),
            tiles.size // launches.CHUNK, 0 if starts is None else starts.data_ptr(), again.data_ptr(),
        )  # fmt: skip
        for name in launches.OUTPUTS:
            launch = _kernel(name, size, part, a.dtype, reverse, transposed, tiles.size, a.device)
            launch((blocks,), launches.THREADS, *arguments)
    if target is not out:
        out.copy_(target)
    return out


def parts(programs: int, rows: int, columns: int, tile: int, multiprocessors: int) -> tuple[Part, ...]:
    """The launches: those of outputs with states, but in tiles of several chunks what they add takes the registers of
    64 columns."""
    if tile > launches.CHUNK:
        return (Part(64, 1, ceil_div(columns, 64)),)
    return launches.parts(programs, rows, columns, multiprocessors)


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
    transposed: bool,
    tile: int,
) -> None:
    """Compile the kernels that so many sequences of all heads will launch, and those of one tile."""
    size = rows, columns
    launches.kernel(launches.CHUNK_OUTPUTS, size, launches.all_columns(columns), dtype, False, reverse, False, device)
    for part in parts(programs, rows, columns, tile, cuda_launch.multiprocessors(device)):
        for name in launches.OUTPUTS:
            _kernel(name, size, part, dtype, reverse, transposed, tile, device)


def shared_memory(name: str, rows: int, columns: int, groups: int, transposed: bool, tile: int) -> int:
    """Bytes that a block asks for."""
    found = launches.shared_memory(name, rows, columns, groups)
    if tile > launches.CHUNK:  # a second table of weights, and of what is lost; two chunks of outputs
        found += launches.TABLES["tile_states"][0] + 4 * (columns + 4) * (name == launches.AGAIN)
        found += 2 * launches.BLOCK * transposed
    return found


def defines(
    name: str,
    size: tuple[int, int],
    part: Part,
    dtype: torch.dtype,
    reverse: bool,
    transposed: bool,
    tile: int,
) -> tuple[tuple[str, int], ...]:
    """What a kernel is compiled with."""
    held = launches.walked_rows(size[0]), part.columns, part.groups
    made = launches.defines(name, *held, dtype, False, reverse, size=size, first=part.first)
    long = (("LONG", 1),) * (tile > launches.CHUNK)
    return *made, ("LENGTH", min(tile, launches.CHUNK)), ("TRANSPOSED", int(transposed)), *long


@cache
def _kernel(
    name: str,
    size: tuple[int, int],
    part: Part,
    dtype: torch.dtype,
    reverse: bool,
    transposed: bool,
    tile: int,
    device: torch.device,
) -> cuda_launch.Kernel:
    held = launches.walked_rows(size[0]), part.columns, part.groups
    return cuda_launch.kernel(
        "constant_decay/cuda/row_outputs.cu", "row_outputs", device,
        defines(name, size, part, dtype, reverse, transposed, tile),
        shared_memory=shared_memory(name, *held, transposed, tile), features="a",
    )  # fmt: skip
