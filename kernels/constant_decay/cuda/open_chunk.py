"""Open tiles on Hopper: launches of open_chunk.cu, and of tile_states.cu that goes on.

Shapes and meaning are those of constant_decay.pytorch.open_chunk and leetdist.operators.opened.open_steps; with
log-decays (B, H, n) those of a decay a token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.open_tiles import OpenTiles
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.cuda import hopper
from leetdist.kernels.constant_decay.cuda.pieces import KEPT, Behind, in_place
from leetdist.kernels.runtime import cuda_launch

CHUNK = 64  # tokens
MOST = 8  # tokens of a call
SOURCES = {"open_steps": "open_chunk.cu", "open_held": "open_held.cu"}
TABLES = 256, 1536  # bytes of weights: of a constant decay, and of a decay a token


def open_chunk(rows: int, columns: int, dtype: torch.dtype, tile: int) -> int | None:
    """Tokens of a chunk of a state of `rows` x `columns`; None where tiles are taken as a whole."""
    return CHUNK if rows <= 256 and tile > CHUNK else None


def steps_serve(rows: int, columns: int) -> bool:
    """Whether `open_steps` knows a state of this size; others go on inside a tile by `advance` and the outputs'
    kernel."""
    return rows in (64, 128, 256) and columns % 64 == 0


def left_out(log_decay: Tensor, tile: int) -> Tensor | None:
    """(H,) int64: tokens at the start of a full tile that its sum leaves out, as hopper_weights.cuh has it."""
    slowest = (-log_decay.float()).clamp(1e-9, 1e4).nan_to_num(nan=1e-9)
    reach = (104.0 / slowest).clamp_max(tile).long()
    return (-(-tile // CHUNK) - ((reach + CHUNK - 1) // CHUNK + 1)).clamp_min(0) * CHUNK


def advance(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    walked: Tensor,
    own: Tensor,
    total: Tensor | None,
    *,
    tile: int,
    at: int | Tensor,
) -> None:
    """See leetdist.kernels.constant_decay.pytorch.open_chunk.advance; `total` is read here, and not moved on."""
    hopper.onward(k, v, log_decay, walked, own, at=at, whole=tile, total=total)


@dataclass(eq=False)  # not frozen, which takes 2 us
class Kept:
    """What a stream keeps of an open chunk: k and v, (B, heads, CHUNK, D), and of a decay a token log_decay,
    (B, H, CHUNK), and the sum of those before the chunk in its tile, (B, H) fp64. known: how pieces are computed that
    came before in the same stream, by their layouts; everything else is laid out alike in all of it."""

    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    total: Tensor | None = None
    known: dict[Hashable, Any] = field(default_factory=dict)


def open_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    kept: Kept,
    walked: Tensor,
    own: Tensor | None,
    *,
    tile: int,
    at: int,
    before: int,
    full: int,
    scale: float,
    tile_outputs: Callable[..., Tensor] = hopper.tile_outputs,
) -> tuple[Tensor, Kept]:
    """A piece of a stream that ends inside its tile, or with it. Returns o, (B, H, n, Dv), and what is kept from token
    `full` on, counted from the open chunk's first.

    q, k, v: (B, heads, n, D); log_decay: (H,) or (B, H, n). kept: of the open chunk, of which `before` tokens count; it
    begins at token `at` of the tile. walked, own: (B, H, Dk, Dv), moved on in place by `full` tokens; own is None where
    that is 0. Whatever the numbers are, the launches are the same: they are recorded and repeated.
    """
    from leetdist.kernels.runtime.replay import repeated

    tokens, given = q.shape[2], (q, k, v)
    layout = (
        q.shape, q.stride(), k.stride(), v.stride(), log_decay.stride(), log_decay.data_ptr() % 16,
        walked.stride(), None if own is None else own.stride(),
        (q.data_ptr() | k.data_ptr() | v.data_ptr() | walked.data_ptr()) % 16, q.is_neg() or k.is_neg() or v.is_neg(),
    )  # fmt: skip
    if layout not in kept.known:
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
    o, after_k, after_v, after_decay, after_total = repeated(
        _open_piece, (q, k, v, log_decay, kept.k, kept.v, kept.log_decay, kept.total, walked, own),
        tile, scale, tile_outputs, numbers=(before, before + tokens, full, at),
        known=(kept.known, layout) if all(x is y for x, y in zip((q, k, v), given, strict=True)) else None,
    )  # fmt: skip
    assert o is not None
    assert after_k is not None
    assert after_v is not None
    return o.narrow(2, before, tokens), Kept(after_k, after_v, after_decay, after_total, kept.known)


@dataclass(frozen=True)
class _Parts(Tiles):
    """As many tiles of a row, however many tokens it has, of which the last may then be empty: repeated launches have
    as many blocks."""

    count_: int = 1

    @property
    def count(self) -> int:
        return self.count_


def _open_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    kept_decay: Tensor | None,
    total: Tensor | None,
    walked: Tensor,
    own: Tensor | None,
    tile: int,
    scale: float,
    tile_outputs: Callable[..., Tensor],
    before: int,
    all_: int,
    full: int,
    at: int,
) -> tuple[Tensor | None, ...]:
    """o behind rows for the `before` tokens of the open chunk that mean nothing; what is kept."""
    batch, tokens, given = q.shape[0], q.shape[2], (q, k, v)
    firsts = tuple(x.new_empty(batch, x.shape[1], CHUNK, x.shape[3]) for x in given)
    after_k, after_v = torch.empty_like(kept_k), torch.empty_like(kept_v)
    ends = (0, 0), (kept_k.data_ptr(), after_k.data_ptr()), (kept_v.data_ptr(), after_v.data_ptr())
    operands = (
        (x.data_ptr(), *x.stride()[:3], x.shape[1], x.shape[3], first.data_ptr(), *end)
        for x, first, end in zip(given, firsts, ends, strict=True)
    )
    blocks, decays = batch * (q.shape[1] + k.shape[1] + v.shape[1]), ()  # type: tuple[int, tuple[int, ...]]
    after_decay = after_total = None
    if kept_decay is not None:
        assert total is not None
        heads = log_decay.shape[1]
        gate = log_decay.new_empty(batch, heads, CHUNK + tokens)
        after_decay, after_total = torch.empty_like(kept_decay), torch.empty_like(total)
        decays = (
            log_decay.data_ptr(), *log_decay.stride(), heads, gate.data_ptr(), kept_decay.data_ptr(),
            after_decay.data_ptr(), total.data_ptr(), after_total.data_ptr(),
        )  # fmt: skip
        blocks, log_decay = blocks + batch * heads, gate
    launch = _rows(kept_decay is not None, q.device)
    launch((blocks, ceil_div(CHUNK + tokens, CHUNK)), 256, *chain(*operands), tokens, before, full, *decays)
    behind_q, behind_k, behind_v = (Behind(first, x, before) for x, first in zip(given, firsts, strict=True))
    heads = walked.shape[1]
    o = q.new_empty(batch, heads, CHUNK + tokens, v.shape[3])
    options: dict[str, Any] = {"reverse": False, "scale": scale, "state_scale": scale, "out_dtype": q.dtype, "out": o}
    chunks, marks = ceil_div(CHUNK - 1 + tokens, CHUNK), cuda_launch.multiprocessors(q.device) // (batch * heads)
    if own is None or min(chunks, marks) < 2:
        tile_outputs(behind_q, behind_k, behind_v, walked[:, :, None], log_decay, Tiles(tile, (0, all_)), **options)
        if own is not None:
            hopper.onward(behind_k, behind_v, log_decay, walked, own, at=at, whole=tile, total=total, tokens=full)
        return o, after_k, after_v, after_decay, after_total
    # The walk is a chain, and faster than that of the outputs, which so has as many parts as there are multiprocessors.
    every = ceil_div(chunks, marks)
    parts = _Parts(every * CHUNK, (0, all_), count_=ceil_div(chunks, every))
    passed = walked.new_empty(batch, heads, parts.count, walked.shape[3], walked.shape[2])
    hopper.onward(
        behind_k, behind_v, log_decay, walked, own,
        at=at, whole=tile, total=total, tokens=full, passed=passed, every=every,
    )  # fmt: skip
    tile_outputs(behind_q, behind_k, behind_v, passed.transpose(3, 4), log_decay, parts, **options)
    return o, after_k, after_v, after_decay, after_total


def whole_tiles(
    columns: Sequence[Sequence[Tensor]],
    lengths: Sequence[int],
    start: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    fold: Callable[..., Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """o of the tiles, (B, H, N, Dv), from the state before them, and the state after them. columns: q, k and v in
    pieces of so many tokens, which are read where they lie; None where they cannot be."""
    laid = in_place(columns, lengths) if tiles.size // CHUNK * 16 <= KEPT else None
    if laid is None:
        return None
    (q, k, v), like = laid, columns[0][0]
    (batch, heads, *_), tokens = start.shape, tiles.num_tokens
    states = start.new_empty(batch, heads, tiles.count, *start.shape[2:])
    hopper.tile_states(k, v, log_decay, tiles, reverse=False, out=states)
    after = fold(states, start, log_decay, tiles, reverse=False)
    assert after is not None
    if like.stride(1) < like.stride(2):
        o = like.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    else:
        o = like.new_empty(batch, heads, tokens, v.shape[3])
    hopper.tile_outputs(
        q, k, v, states, log_decay, tiles,
        reverse=False, scale=scale, state_scale=scale, out_dtype=o.dtype, out=o,
    )  # fmt: skip
    return o, after


def open_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    open_: OpenTiles,
    log_decay: Tensor | None,
    *,
    scale: float,
    index: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """See leetdist.operators.opened.open_steps. One launch, which moves the slots on itself."""
    (batch, _, tokens, rows), heads = q.shape, open_.start.shape[1]
    dim = v.shape[3]
    o = torch.empty(batch, heads, tokens, dim, dtype=q.dtype, device=q.device)
    if tokens > MOST:
        raise ValueError(f"q must hold at most {MOST} tokens, got {tokens}")
    if not o.numel():
        return o
    assert open_.walked is not None
    assert open_.own is not None
    assert open_.held is not None
    columns = columns_of(batch * heads, rows, dim, cuda_launch.multiprocessors(q.device))
    decays: tuple[int, ...]
    if log_decay is None:
        assert open_.keep is not None
        decays = open_.log_decay.data_ptr(), open_.keep.data_ptr()
    else:
        assert open_.total is not None
        decays = log_decay.data_ptr(), *log_decay.stride(), open_.log_decay.data_ptr(), open_.total.data_ptr()
    given = [_aligned(x) for x in (q, k, v)]
    launch = _kernel("open_steps", rows, columns, dim // columns, q.dtype, log_decay is not None, q.device)
    launch(
        (heads * (dim // columns), batch), 2 * columns,
        *(x for tensor in given for x in (tensor.data_ptr(), *tensor.stride()[:3], heads // tensor.shape[1])),
        o.data_ptr(), open_.start.data_ptr(), open_.walked.data_ptr(), open_.own.data_ptr(),
        open_.held.data_ptr(), open_.k.data_ptr(), open_.v.data_ptr(), open_.tokens.data_ptr(),
        open_.arrived.data_ptr(),
        *_numbers(index), *_numbers(lengths), tokens, open_.tokens.shape[0], heads, open_.tile, *decays, float(scale),
    )  # fmt: skip
    return o


def held(walked: Tensor, dtype: torch.dtype) -> Tensor:
    """What `open_steps` reads of the walk's states (B, H, Dk, Dv) until a chunk is closed: rounded to `dtype` as
    products take them, in the order of threads, (B, H, Dk * Dv), in fp16 with a unit a column behind 16 of them."""
    (batch, heads, rows, dim), walked = walked.shape, walked.contiguous()
    made = walked.new_empty(batch, heads, dim * (rows + 2 * (dtype == torch.float16)), dtype=dtype)
    columns = columns_of(batch * heads, rows, dim, cuda_launch.multiprocessors(walked.device))
    launch = _kernel("open_held", rows, columns, dim // columns, dtype, False, walked.device)
    if made.numel():
        launch((batch * heads * (dim // columns),), 2 * columns, walked.data_ptr(), made.data_ptr())
    return made


def columns_of(programs: int, rows: int, columns: int, multiprocessors: int) -> int:
    """Columns of a state that a block holds; no bit depends on it. Few states are shared by more blocks."""
    return 32 if programs * (columns // 64) < multiprocessors else 64


def shared_memory(rows: int, columns: int, token: bool) -> int:
    """Bytes that a block asks for."""
    pitch, pitch_of_columns, pitch_of_scores = (2 * x + 16 for x in (rows, columns, CHUNK))
    state = columns * 2 * (rows + 2) + 16  # with units, and what says that it is there
    tokens = CHUNK * (pitch + pitch_of_columns) + MOST * (pitch + pitch_of_scores)
    return 1024 + state + tokens + 4 * columns + 16 + TABLES[token]


def defines(rows: int, columns: int, splits: int, dtype: torch.dtype, token: bool) -> tuple[tuple[str, int], ...]:
    """What the kernel is compiled with."""
    half = int(dtype == torch.float16)
    made = ("ROWS", rows), ("COLUMNS", columns), ("SPLITS", splits), ("HALF", half), ("GROUPS", 1), ("REVERSE", 0)
    return (*made, ("TOKEN", 1)) if token else made


@cache
def _kernel(
    name: str, rows: int, columns: int, splits: int, dtype: torch.dtype, token: bool, device: torch.device
) -> cuda_launch.Kernel:
    return cuda_launch.kernel(
        f"constant_decay/cuda/{SOURCES[name]}", name, device, defines(rows, columns, splits, dtype, token),
        shared_memory=shared_memory(rows, columns, token) if name == "open_steps" else 0, features="a",
    )  # fmt: skip


@cache
def _rows(token: bool, device: torch.device) -> cuda_launch.Kernel:
    made = ("HALF", 0), ("GROUPS", 1), ("TOKEN", int(token))  # numbers are copied as bits
    return cuda_launch.kernel(
        "constant_decay/cuda/open_rows.cu", "open_rows", device, made, shared_memory=0, features="a"
    )


def _aligned(x: Tensor) -> Tensor:
    """x (batch, heads, tokens, dim), or a copy, whose rows are whole vectors of 16 bytes, each somewhere else, of its
    values in memory."""
    wrong = x.data_ptr() % 16 or x.is_neg() or (x.stride(3) != 1 and x.shape[3] > 1)
    wrong = wrong or any(step % 8 or step < 1 for step, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1)
    return x.clone(memory_format=torch.contiguous_format) if wrong else x


def _numbers(x: Tensor | None) -> tuple[int, int, int]:
    """Address and stride of numbers, and whether they have 64 bits."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), int(x.dtype == torch.int64))
