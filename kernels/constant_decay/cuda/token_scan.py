"""Launches token_scan.cu: `tile_outputs` token by token on the CUDA cores, in fp32 for every dtype.

Shapes and meaning are those of constant_decay.pytorch.block. The order of every sum depends on the shape of one token
and the tile length alone: the bits do not change with the batch, the number of tiles, or from run to run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.memory import empty_outputs
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.runtime.cuda_launch import kernel

MOST_ROWS = 256
VECTOR = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
    by_token: bool = False,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs. by_token: a decay at every token."""
    batch, heads = a.shape[0], log_decay.shape[0]
    rows, columns = a.shape[3], c.shape[3]
    if out is None:
        out = empty_outputs(a, c, log_decay, out_dtype)
    if out.numel():
        width, threads, held = _shape(rows)
        table = tiles.needed_table(a.device)
        decay = log_decay.float().contiguous()
        vector = _vector(a, b, c) if states.data_ptr() % 16 == 0 else 1
        launch = kernel(
            "constant_decay/cuda/token_scan.cu",
            "tile_outputs",
            a.device,
            _defines(width, a.dtype, out.dtype, vector, by_token),
        )
        sign = -1 if reverse else 1
        launch(
            (batch * heads * tiles.count, ceil_div(columns, held)), threads,
            *_rows(a, heads, sign), *_rows(b, heads, sign), *_rows(c, heads, sign),
            states.data_ptr(), *states.stride(),
            out.data_ptr(), *out.stride()[:2], sign * out.stride(2),
            decay.data_ptr(), 0 if table is None else table.data_ptr(),
            heads, tiles.count, tiles.size, a.shape[2], rows, columns, int(reverse),
            float(scale), float(state_scale),
        )  # fmt: skip
    return out


def tile_outputs_by_token(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    """`tile_outputs` with a decay at every token."""
    return tile_outputs(*args, out=out, by_token=True, **kwargs)


def configuration(rows: int, columns: int, dtype: torch.dtype, tile: int, precision: str | None) -> str:
    """What `explain` says of this kernel."""
    width, threads, held = _shape(rows)
    return f"token by token in fp32, {width} rows x {held} columns and {threads} threads a block"


@cache
def _shape(rows: int) -> tuple[int, int, int]:
    """The padded rows, the threads of a block, and the columns that a block holds."""
    width = max(32, 1 << (rows - 1).bit_length())
    if width > MOST_ROWS:
        raise ValueError(f"the CUDA kernels hold a state of up to {MOST_ROWS} rows, got {rows}")
    warps, lanes = (4 if width >= 128 else 2), (8 if width <= 128 else 16)
    return width, 32 * warps, warps * (32 // lanes) * 8


def _defines(
    width: int, dtype: torch.dtype, out: torch.dtype, vector: int, by_token: bool
) -> tuple[tuple[str, int], ...]:
    kinds = ("DK", width), ("IN", DTYPES[dtype]), ("OUT", DTYPES[out])
    return *kinds, ("VECTOR", vector), ("BY_TOKEN", int(by_token))


def _vector(*operands: Tensor) -> int:
    """How many elements one instruction may load. The bits are the same either way."""
    for x in operands:
        strides = (x.shape[3], *(stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1))
        if x.data_ptr() % (VECTOR * x.element_size()) or any(stride % VECTOR for stride in strides):
            return 1
    return VECTOR


def _rows(x: Tensor, heads: int, sign: int = 1) -> tuple[int, ...]:
    """Address, strides of batch, head and token, and the heads that share one of x's."""
    batch, head, token, _ = x.stride()
    return x.data_ptr(), batch, head, sign * token, heads // x.shape[1]
