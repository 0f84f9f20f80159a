"""Launches of tile_states.cu, tile_outputs.cu and chunk_outputs.cu: Hopper (sm_90), bf16 and fp16, a state of up to 256
rows and any number of columns, both multiples of 8.

Shapes and meaning are those of constant_decay.pytorch.block, and with a log_decay (B, H, N) those of
token_decay.pytorch.block. The order of every sum depends on the head sizes and the tile length alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from leetdist.kernels.common.blocks import taking
from leetdist.kernels.common.memory import address_of, are_zeros, empty_outputs, empty_states, heads_of
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.cuda.pieces import KEPT, Operand, fetched
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.runtime.tensor_map import MAP_BYTES, TensorMap, tensor_map

THREADS = 128  # of a warpgroup
BLOCK = 64 * 64 * 2  # bytes of 64 tokens of 64 numbers
ROWS_STEP = 32  # 16 a product's step, in each of two halves of more than 128 rows
MOST_ROWS_OF_THREE = 192  # of a block of three warpgroups
BARRIERS = 1536  # bytes for them, and for what rounds the first address up to 1,024
# Bytes of a warpgroup's tables: of a constant decay, and of a decay a token.
TABLES = {"tile_states": (256, 4 * 256), "tile_outputs": (1280, 512 + 4 * 448)}
SLOT = 272  # bytes in which a chunk's log-decays come
AGAIN = "tile_outputs again"  # the second compilation of tile_outputs.cu, for tiles with NaNs and infinities
OUTPUTS = ("tile_outputs", AGAIN)  # launched one behind the other
CHUNK_OUTPUTS = "chunk_outputs"  # of tiles of one chunk that begin from zero
CHUNK = 64  # tokens
ONWARD = "tile_states onward"  # the compilation of tile_states.cu that goes on from a state
PASSING = f"{ONWARD}, passing"  # which tells others of it on its way


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
    operands, (way, pieces) = (*_operand(b, heads, kept), *_operand(c, heads, kept)), fetched(b, c)
    for part in parts(programs, *size, _multiprocessors(c.device)):
        launch = _kernel("tile_states", size, part, b.dtype, False, reverse, token, b.device, pieces=way)
        launch(
            (programs * part.splits,), THREADS * part.groups, *operands, out.data_ptr(), out.stride(2),
            *_tiles(tiles, log_decay, part.splits, b, c), tiles.unread(reverse, to_end), float(scale),
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
    part = Part(*shares(programs, b.shape[3], c.shape[3], _multiprocessors(c.device)))
    kept: list[Tensor] = []
    places, place = (0, at) if isinstance(at, int) else (at.contiguous(), 0)
    tokens, size = b.shape[2] if tokens is None else tokens, (b.shape[3], c.shape[3])
    name, (way, pieces) = ONWARD if passed is None else PASSING, fetched(b, c)
    launch = _kernel(name, size, part, b.dtype, False, False, token, b.device, pieces=way)
    launch(
        (programs * part.splits, 2), THREADS * part.groups,
        *_operand(b, heads, kept), *_operand(c, heads, kept), walked.data_ptr(), size[0] * size[1],
        *_tiles(Tiles(tokens, (0, tokens)), log_decay, part.splits, b, c), -1, 1.0, own.data_ptr(),
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
    if not wide and _map(out) is None:
        target = out.clone(memory_format=torch.contiguous_format)  # which other tiles have written to
    size, processors = (a.shape[3], c.shape[3]), _multiprocessors(c.device)
    operands, (way, pieces) = tuple(x for own in (a, b, c) for x in _operand(own, heads, kept)), fetched(a, b, c)
    place = bytes(MAP_BYTES) if wide else _map(target)  # wide outputs use no map
    places = place, target.data_ptr(), *(target.stride()[:3] if wide < 2 else (0, 0, 0))
    if onto is None and wide < 2 and not high and are_zeros(states) and walks_chunks(*size):
        short, tiles = tiles.up_to(CHUNK)
        if programs := a.shape[0] * heads * short.count:
            launch = _kernel(CHUNK_OUTPUTS, size, all_columns(size[1]), a.dtype, wide, reverse, token, a.device)
            blocks = min(programs, walking(*size, processors))
            launch(
                (blocks,), THREADS, *operands, *places, *_tiles(short, log_decay, 1, a, b, c), float(scale),
                programs, blocks,
            )  # fmt: skip
    programs = a.shape[0] * heads * tiles.count
    for part in parts(programs, *size, processors, high) if programs else ():
        blocks = programs * part.splits
        again = torch.empty(blocks, dtype=torch.int32, device=a.device)  # written by every block
        arguments = (
            *operands, address_of(states), *states.stride(), *places, *_tiles(tiles, log_decay, part.splits, a, b, c),
            float(scale), float(state_scale), scale_of_added(float(scale), float(state_scale)), again.data_ptr(),
            *(() if onto is None else (onto.data_ptr(),)),
            *pieces,
        )  # fmt: skip
        for name in OUTPUTS:
            launch = _kernel(name, size, part, a.dtype, wide, reverse, token, a.device, onto is not None, high, way)
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
        _kernel(CHUNK_OUTPUTS, (rows, columns), all_columns(columns), dtype, wide, reverse, token, device)
    more = wide and outputs, reverse, token, device, onto and outputs, high
    for part in parts(programs, rows, columns, _multiprocessors(device), high):
        for name in OUTPUTS if outputs else (step,):
            _kernel(name, (rows, columns), part, dtype, *more)


def configuration(rows: int, columns: int, dtype: torch.dtype, tile: int, precision: str | None) -> str:
    """What `explain` says of these kernels."""
    found = f"chunks of 64 tokens, {walked_rows(min(rows, 256))} rows of the state a warpgroup, copied by bulk"
    return found if rows <= 256 else f"{found}, one block of rows after the other"


def shares(programs: int, rows: int, columns: int, multiprocessors: int, high: bool = False) -> tuple[int, int, int]:
    """Columns that a warpgroup holds, warpgroups of a block, and blocks that share a tile's columns. None of it changes
    a bit. Where multiprocessors would have nothing to do, warpgroups hold fewer columns, or have one to themselves."""
    blocks = ceil_div(columns, 64)
    if rows > 128 or high:
        groups = 1 if blocks % 2 or programs * blocks <= multiprocessors else 2
        return 64, groups, blocks // groups
    held = 64 if blocks % 2 or programs * (blocks // 2) <= multiprocessors else 128
    return held, 1, 64 * blocks // held


@dataclass(frozen=True)
class Part:
    """What one launch has of a tile's columns, from the first on: as `shares` says."""

    columns: int
    groups: int
    splits: int
    first: int = 0


@lru_cache(maxsize=512)
def parts(programs: int, rows: int, columns: int, multiprocessors: int, high: bool = False) -> tuple[Part, ...]:
    """The launches of a kernel: one; but where warpgroups share chunks, which is faster, and an odd number of them
    would hold all columns, three share some, and pairs the rest. Three have registers for fewer rows: with more, or
    where they leave multiprocessors with nothing to do, the last one is by itself."""
    whole, blocks = Part(*shares(programs, rows, columns, multiprocessors, high)), ceil_div(columns, 64)
    if (rows <= 128 and not high) or whole.groups == 2 or blocks < 3 or programs * blocks <= multiprocessors:
        return (whole,)
    if high or rows > MOST_ROWS_OF_THREE or programs * blocks <= 2 * multiprocessors:
        return Part(64, 2, blocks // 2), Part(64, 1, 1, 64 * (blocks - 1))
    if blocks % 3 == 0:
        return (Part(64, 3, blocks // 3),)
    return Part(64, 3, 1), Part(64, 2, (blocks - 3) // 2, 192)


def walked_rows(rows: int) -> int:
    """Rows of a state with which kernels walk one of so many: the rest are zeros."""
    return ROWS_STEP * ceil_div(rows, ROWS_STEP)


def walks_chunks(rows: int, columns: int) -> bool:
    """Whether chunk_outputs.cu has room for such heads."""
    return max(rows, columns) <= 256


def all_columns(columns: int) -> Part:
    """A warpgroup has all of them, where it keeps no state."""
    return Part(64 * ceil_div(columns, 64), 1, 1)


def walking(rows: int, columns: int, multiprocessors: int) -> int:
    """Blocks of chunk_outputs.cu that are at work at a time."""
    each = walked_rows(rows) + all_columns(columns).columns
    return multiprocessors * (3 if each <= 128 else 2 if each <= 256 else 1)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(
    name: str, rows: int, columns: int, groups: int, token: bool = False, high: bool = False, pieces: int = 0
) -> int:
    """Bytes that a block asks for; how many chunks there are of each operand is as in the kernels."""
    step = name.split()[0]
    if name == CHUNK_OUTPUTS:
        tables = TABLES["tile_outputs"][token] + 4 * (columns + 4) + (2 * SLOT if token else 0)
        return (2 * (2 * ceil_div(rows, 64) + columns // 64) + 1) * BLOCK + BARRIERS + tables
    if step == "tile_states":
        chunks_b = chunks_c = slots = 3 if rows <= 128 else 2 if groups == 1 else 4
        chunks_a = 0
    elif rows <= 128 and not high:
        chunks_a = chunks_b = chunks_c = slots = 2
    else:
        chunks_a, chunks_b, chunks_c = (1, 1, 2) if groups == 1 else (2, 2 if high and rows > 192 else 3, 2)
        slots = chunks_a
    operands = (chunks_a + chunks_b) * 64 * ceil_div(rows, 64) + chunks_c * groups * columns
    scores = 0 if step == "tile_states" else (1 + high) * (1 if groups == 1 else chunks_b)
    each = TABLES[step][token]
    if name == AGAIN:
        each += 4 * (columns + 4)  # from which token on each column is lost
    return (
        (operands // 64 + scores) * BLOCK
        + BARRIERS
        + groups * each
        + (slots * SLOT if token else 0)
        + (pieces == 1) * KEPT
    )


def defines(
    name: str,
    rows: int,
    columns: int,
    groups: int,
    dtype: torch.dtype,
    wide: int,
    reverse: bool,
    token: bool = False,
    *,
    size: tuple[int, int] | None = None,
    first: int = 0,
    onto: bool = False,
    high: bool = False,
    pieces: int = 0,
) -> tuple[tuple[str, int], ...]:
    """What a kernel is compiled with; `wide`: for outputs in fp32; `token`: for a decay a token; `size`: the state's
    rows and columns, where blocks have not as many; `first`: of their columns; `onto`: for outputs that are added to
    others; `high`: as of `tile_outputs`; `pieces`: how operands are `fetched`."""
    made: tuple[tuple[str, int], ...] = (
        ("ROWS", rows), ("COLUMNS", columns), ("GROUPS", groups), ("HALF", int(dtype == torch.float16)),
        ("WIDE", int(wide)), ("REVERSE", int(reverse)), ("AGAIN", int(name in (AGAIN, CHUNK_OUTPUTS))),
    )  # fmt: skip
    own_rows, own_columns = (rows, columns) if size is None else size
    made += (("STATE_ROWS", own_rows),) * (own_rows < rows)
    cut = size is not None and (first > 0 or own_columns % (groups * columns) > 0)
    made += (("STATE_COLUMNS", own_columns),) * cut + (("FIRST", first),) * (first > 0)
    made += (("ONTO", 1),) * onto + (("HIGH", 1),) * high + (("PIECES", pieces),) * (pieces > 0)
    return (
        made
        + (("TOKEN", 1),) * token
        + (("ONWARD", 1),) * (name in (ONWARD, PASSING))
        + (("PASSES", 1),) * (name == PASSING)
    )


@cache
def _kernel(
    name: str,
    size: tuple[int, int],
    part: Part,
    dtype: torch.dtype,
    wide: int,
    reverse: bool,
    token: bool,
    device: torch.device,
    onto: bool = False,
    high: bool = False,
    pieces: int = 0,
) -> cuda_launch.Kernel:
    """size: the state's rows and columns."""
    held = walked_rows(size[0]), part.columns, part.groups
    made = defines(
        name, *held, dtype, wide, reverse, token, size=size, first=part.first, onto=onto, high=high, pieces=pieces
    )  # fmt: skip
    memory = shared_memory(name, *held, token, high, pieces)
    step = name.split()[0]
    return cuda_launch.kernel(f"constant_decay/cuda/{step}.cu", step, device, made, shared_memory=memory, features="a")


def _tiles(tiles: Tiles, log_decay: Tensor, splits: int, *operands: Operand) -> tuple[int, ...]:
    """Where the tiles are, and the decays; of a decay a token also how many heads share an operand at most."""
    heads, table = heads_of(log_decay), 0 if tiles.regular else tiles.table(log_decay.device).data_ptr()
    found = log_decay.data_ptr(), table, heads, tiles.count, tiles.size, tiles.num_tokens, splits
    if log_decay.ndim == 1:
        return found
    return *found, *log_decay.stride()[:2], max(heads // x.shape[1] for x in operands)


def _operand(x: Operand, heads: int, kept: list[Tensor]) -> tuple[bytes, int]:
    """The map of x, or of a copy that has one, and how many heads share one of x's. A copy joins `kept`, for its memory
    is another's as soon as nobody holds it."""
    if not isinstance(x, Tensor):
        return x.map, heads // x.shape[1]
    found = _map(x)
    if found is None:
        x = x.clone(memory_format=torch.contiguous_format)
        kept.append(x)
        found = _map(x)
        assert found is not None
    return found, heads // x.shape[1]


def _map(x: Tensor) -> TensorMap | None:
    """x (batch, heads, tokens, dim), 16-bit, as the copy engine knows it, in blocks of 64 tokens x 64 numbers; None
    where x is not made of multiples of 16 bytes."""
    return tensor_map(x.data_ptr(), (x.dtype, x.shape, x.stride()))
