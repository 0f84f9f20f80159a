"""Launches of tile_states.cu, tile_outputs.cu and chunk_outputs.cu: Hopper (sm_90), bf16 and fp16, a state of up to 256
rows and any number of columns, both multiples of 8.

Shapes and meaning are those of constant_decay.pytorch.block, and with a log_decay (B, H, N) those of
token_decay.pytorch.block. The order of every sum depends on the head sizes and the tile length alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leetdist.kernels.common.blocks import taking
from leetdist.kernels.common.memory import address_of, are_zeros, empty_outputs, empty_states, heads_of
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.cuda.launches import (
    CHUNK,
    CHUNK_OUTPUTS,
    ONWARD,
    OUTPUTS,
    PASSING,
    THREADS,
    Part,
    all_columns,
    kernel,
    parts,
    shares,
    walked_rows,
    walking,
    walks_chunks,
)
from leetdist.kernels.constant_decay.cuda.operands import operand_arguments, tile_arguments
from leetdist.kernels.constant_decay.cuda.pieces import Operand, fetched
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.runtime.tensor_map import MAP_BYTES, map_of


def tile_states(
    b: Operand,
    c: Operand,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float = 1.0,
    to_end: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_states. What is no tensor, with `out`, is k and v."""
    if out is None:
        assert isinstance(b, Tensor)
        assert isinstance(c, Tensor)
        out = empty_states(b, c, log_decay, tiles)
    if not out.numel():
        return out
    heads, token = heads_of(log_decay), log_decay.ndim == 3
    programs = b.shape[0] * heads * tiles.count
    size, kept = (b.shape[3], c.shape[3]), []  # type: ignore[var-annotated]
    operands = *operand_arguments(b, heads, kept), *operand_arguments(c, heads, kept)
    way, pieces = fetched(b, c)
    for part in parts(programs, *size, cuda_launch.multiprocessors(c.device)):
        launch = kernel("tile_states", size, part, b.dtype, False, reverse, token, b.device, pieces=way)
        launch(
            (programs * part.splits,), THREADS * part.groups, *operands, out.data_ptr(), out.stride(2),
            *tile_arguments(tiles, log_decay, part.splits, b, c), tiles.unread(reverse, to_end), float(scale),
            *pieces,
        )  # fmt: skip
    return out


def onward(
    b: Operand,
    c: Operand,
    log_decay: Tensor,
    walked: Tensor,
    own: Tensor,
    *,
    at: int | Tensor,
    whole: int,
    total: Tensor | None = None,
    tokens: int | None = None,
    passed: Tensor | None = None,
    every: int = 1,
) -> None:
    """`tile_states` of one tile, forward, not from zero but from two states (B, H, Db, Dc), in place: that which the
    outputs start from, and the tile's own sum. Of `tokens` of the tile (all there are here), from number `at` on, a
    multiple of CHUNK (a number, or (B,) int64).

    whole: the tile's length: what its own sum leaves out is forgotten where it ends. total: (B, H) fp64, the sum of the
    log-decays before, one a token; NaN says that one is no decay. passed: (B, H, any, Dc, Db), for what `walked` is
    before `every` chunks, transposed.
    """
    heads, token = heads_of(log_decay), log_decay.ndim == 3
    programs = b.shape[0] * heads
    part = Part(*shares(programs, b.shape[3], c.shape[3], cuda_launch.multiprocessors(c.device)))
    kept: list[Tensor] = []
    places, place = (0, at) if isinstance(at, int) else (at.contiguous(), 0)
    tokens, size = b.shape[2] if tokens is None else tokens, (b.shape[3], c.shape[3])
    name, (way, pieces) = ONWARD if passed is None else PASSING, fetched(b, c)
    launch = kernel(name, size, part, b.dtype, False, False, token, b.device, pieces=way)
    launch(
        (programs * part.splits, 2), THREADS * part.groups,
        *operand_arguments(b, heads, kept), *operand_arguments(c, heads, kept), walked.data_ptr(), size[0] * size[1],
        *tile_arguments(Tiles(tokens, (0, tokens)), log_decay, part.splits, b, c), -1, 1.0, own.data_ptr(),
        places if isinstance(places, int) else places.data_ptr(), place, whole,
        0 if total is None else total.data_ptr(),
        *(() if passed is None else (passed.data_ptr(), every, passed.shape[2])), *pieces,
    )  # fmt: skip


def between(a: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles) -> Tensor:
    """Memory for outputs in fp32 that others are added to, in the order in which threads have them: of each tile,
    blocks of a chunk and 64 columns."""
    chunks = a.shape[0] * heads_of(log_decay) * (tiles.num_tokens // CHUNK + tiles.count)
    return torch.empty(chunks * ceil_div(c.shape[3], 64) * CHUNK * 64, dtype=torch.float32, device=a.device)


@taking(between)
def tile_outputs(
    a: Operand,
    b: Operand,
    c: Operand,
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
    high: bool = False,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs. onto: what the same call of other rows has made
    of `between`, as its `out`: the outputs are added to it before they are rounded. high: the state and the scores are
    two 16-bit numbers each, of a decay a head. What is no tensor, with `out`, is q, k and v."""
    if out is None:
        assert isinstance(a, Tensor)
        assert isinstance(c, Tensor)
        out = empty_outputs(a, c, log_decay, out_dtype)
    if not out.numel():
        return out
    heads, token = heads_of(log_decay), log_decay.ndim == 3
    kept: list[Tensor] = []
    wide, target = 2 if out.ndim == 1 else int(out.dtype != a.dtype), out
    if not wide and map_of(out) is None:
        target = out.clone(memory_format=torch.contiguous_format)  # which other tiles have written to
    size, processors = (a.shape[3], c.shape[3]), cuda_launch.multiprocessors(c.device)
    operands = tuple(x for own in (a, b, c) for x in operand_arguments(own, heads, kept))
    way, pieces = fetched(a, b, c)
    place = bytes(MAP_BYTES) if wide else map_of(target)  # wide outputs use no map
    places = place, target.data_ptr(), *(target.stride()[:3] if wide < 2 else (0, 0, 0))
    if onto is None and wide < 2 and not high and are_zeros(states) and walks_chunks(*size):
        short, tiles = tiles.up_to(CHUNK)
        if programs := a.shape[0] * heads * short.count:
            launch = kernel(CHUNK_OUTPUTS, size, all_columns(size[1]), a.dtype, wide, reverse, token, a.device)
            blocks = min(programs, walking(*size, processors))
            launch(
                (blocks,), THREADS, *operands, *places, *tile_arguments(short, log_decay, 1, a, b, c), float(scale),
                programs, blocks,
            )  # fmt: skip
    programs = a.shape[0] * heads * tiles.count
    for part in parts(programs, *size, processors, high) if programs else ():
        blocks = programs * part.splits
        again = torch.empty(blocks, dtype=torch.int32, device=a.device)  # written by every block
        arguments = (
            *operands, address_of(states), *states.stride(), *places,
            *tile_arguments(tiles, log_decay, part.splits, a, b, c),
            float(scale), float(state_scale), scale_of_added(float(scale), float(state_scale)), again.data_ptr(),
            *(() if onto is None else (onto.data_ptr(),)),
            *pieces,
        )  # fmt: skip
        for name in OUTPUTS:
            launch = kernel(name, size, part, a.dtype, wide, reverse, token, a.device, onto is not None, high, way)
            launch((blocks,), THREADS * part.groups, *arguments)
    if target is not out:
        out.copy_(target)
    return out


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
    token: bool = False,
    onto: bool = False,
    high: bool = False,
) -> None:
    """Compile the kernels that `step` ("tile_states" or "tile_outputs") will launch for so many tiles of all heads.
    share: how many heads share an operand, which only kernels of a decay a token (`token`) care for. onto: outputs are
    added to others. high: as of `tile_outputs`."""
    outputs = step == "tile_outputs"
    high = high and outputs
    if outputs and not onto and not high and walks_chunks(rows, columns):
        kernel(CHUNK_OUTPUTS, (rows, columns), all_columns(columns), dtype, wide, reverse, token, device)
    more = wide and outputs, reverse, token, device, onto and outputs, high
    for part in parts(programs, rows, columns, cuda_launch.multiprocessors(device), high):
        for name in OUTPUTS if outputs else (step,):
            kernel(name, (rows, columns), part, dtype, *more)


def configuration(rows: int, columns: int, dtype: torch.dtype, tile: int, precision: str | None) -> str:
    """What `explain` says of these kernels."""
    found = f"chunks of 64 tokens, {walked_rows(min(rows, 256))} rows of the state a warpgroup, copied by bulk"
    return found if rows <= 256 else f"{found}, one block of rows after the other"
