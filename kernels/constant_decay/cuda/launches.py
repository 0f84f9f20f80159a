"""How the kernels for Hopper are compiled: which of them there are, with which macros, how much shared memory a block
asks for, and how a tile's columns are shared out among warpgroups, blocks and launches. None of the sharing changes a
bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.constant_decay.cuda.pieces import KEPT
from leetdist.kernels.runtime import cuda_launch

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
def kernel(
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
    """The kernel of one launch; size: the state's rows and columns."""
    held = walked_rows(size[0]), part.columns, part.groups
    made = defines(
        name, *held, dtype, wide, reverse, token, size=size, first=part.first, onto=onto, high=high, pieces=pieces
    )  # fmt: skip
    memory = shared_memory(name, *held, token, high, pieces)
    step = name.split()[0]
    return cuda_launch.kernel(f"constant_decay/cuda/{step}.cu", step, device, made, shared_memory=memory, features="a")
