"""Open tiles on Hopper: launches of open_chunk.cu, and of tile_states.cu that goes on.

Shapes and meaning are those of constant_decay.pytorch.open_chunk and leetdist.operators.opened.open_steps; with
log-decays (B, H, n) those of a decay a token.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from leetdist.kernels.common import loader
from leetdist.kernels.common.open_tiles import OpenTiles
from leetdist.kernels.constant_decay.cuda import hopper

CHUNK = 64  # tokens
MOST = 8  # tokens of a call
WARP = 16  # columns of a state that one holds, and threads of it by two
TABLES = 256, 1536  # bytes of weights: of a constant decay, and of a decay a token


def open_chunk(rows: int, columns: int, dtype: torch.dtype, tile: int) -> int:
    """Tokens of a chunk of a state of `rows` x `columns`."""
    return CHUNK


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
    hopper.onward(k, v, log_decay, walked, at=at)
    hopper.onward(k, v, log_decay, own, at=at, whole=tile, total=total)


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
    columns = columns_of(batch * heads, rows, dim, hopper._multiprocessors(q.device))
    decays: tuple[int, ...]
    if log_decay is None:
        assert open_.keep is not None
        decays = open_.log_decay.data_ptr(), open_.keep.data_ptr()
    else:
        assert open_.total is not None
        decays = log_decay.data_ptr(), *log_decay.stride(), open_.log_decay.data_ptr(), open_.total.data_ptr()
    given = [_aligned(x) for x in (q, k, v)]
    launch = _kernel(rows, columns, dim // columns, q.dtype, log_decay is not None, q.device)
    launch(
        (heads * (dim // columns), batch), 2 * columns,
        *(x for tensor in given for x in (tensor.data_ptr(), *tensor.stride()[:3], heads // tensor.shape[1])),
        o.data_ptr(), open_.start.data_ptr(), open_.walked.data_ptr(), open_.own.data_ptr(),
        open_.k.data_ptr(), open_.v.data_ptr(), open_.tokens.data_ptr(), open_.arrived.data_ptr(),
        *_numbers(index), *_numbers(lengths), tokens, open_.tokens.shape[0], heads, open_.tile, *decays, float(scale),
    )  # fmt: skip
    return o


def columns_of(programs: int, rows: int, columns: int, multiprocessors: int) -> int:
    """Columns of a state that a block holds; no bit depends on it. Few states are shared by more blocks."""
    return 32 if programs * (columns // 64) < multiprocessors else 64


def shared_memory(rows: int, columns: int, token: bool) -> int:
    """Bytes that a block asks for."""
    pitch, pitch_of_columns, pitch_of_scores = (2 * x + 16 for x in (rows, columns, CHUNK))
    tokens = CHUNK * (pitch + pitch_of_columns) + MOST * (pitch + pitch_of_scores)
    return 1024 + tokens + 4 * columns + 16 + TABLES[token]


def defines(rows: int, columns: int, splits: int, dtype: torch.dtype, token: bool) -> tuple[tuple[str, int], ...]:
    """What the kernel is compiled with."""
    half = int(dtype == torch.float16)
    made = ("ROWS", rows), ("COLUMNS", columns), ("SPLITS", splits), ("HALF", half), ("GROUPS", 1), ("REVERSE", 0)
    return (*made, ("TOKEN", 1)) if token else made


@cache
def _kernel(
    rows: int, columns: int, splits: int, dtype: torch.dtype, token: bool, device: torch.device
) -> loader.Kernel:
    return loader.kernel(
        "constant_decay/cuda/open_chunk.cu", "open_steps", device, defines(rows, columns, splits, dtype, token),
        shared_memory=shared_memory(rows, columns, token), features="a",
    )  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    """x (batch, heads, tokens, dim), or a copy, whose rows are whole vectors of 16 bytes."""
    wrong = x.data_ptr() % 16 or any(step % 8 for step, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1)
    return x.clone(memory_format=torch.contiguous_format) if wrong else x


def _numbers(x: Tensor | None) -> tuple[int, int, int]:
    """Address and stride of numbers, and whether they have 64 bits."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), int(x.dtype == torch.int64))
