"""How a tile goes on inside, in Triton: see constant_decay.pytorch.open_chunk. The arithmetic is that of block.py."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.memory import heads_of
from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.constant_decay.pytorch.open_chunk import lost_columns
from leetdist.kernels.constant_decay.triton.block import FP32_RANGE, first_chunk, in_units, states_block, summed
from leetdist.kernels.constant_decay.triton.configs import block_config, padded, parts_of
from leetdist.kernels.constant_decay.triton.parts import in_parts, load_chunk, product
from leetdist.kernels.constant_decay.triton.weights import ANCHOR, gate_of, lost_across, weights_to_state
from leetdist.kernels.runtime.triton_launch import launch

COUNTS = ["tokens", "tile_size", "at"]


def open_chunk(rows: int, columns: int, dtype: torch.dtype, tile: int) -> int:
    """Sums of a decay a token start anew every ANCHOR tokens, of which chunks are parts."""
    return min(ANCHOR.value, tile)


def left_out(log_decay: Tensor, tile: int) -> Tensor | None:
    """As `first_chunk` has it; where rounding decides between two chunks, the first of them."""
    reach = (1.000001 * FP32_RANGE.value / (-log_decay.double()).clamp_min(1e-9)).clamp_max(tile).long()
    chunk = min(ANCHOR.value, tile)
    return (tile // chunk - 1 - (reach + chunk - 1) // chunk).clamp_min(0) * chunk


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
    """See constant_decay.pytorch.open_chunk.advance; log_decay: (H,), or the sums of a decay a token."""
    batch, heads, tokens = k.shape[0], heads_of(log_decay), k.shape[2]
    rows, columns = k.shape[3], v.shape[3]
    parts = parts_of(k.dtype, None)
    for state, sums in ((walked, False), (own, True)):
        config = block_config(rows, columns, k.dtype, tile, None if sums else parts)
        block = states_block(rows, config) if sums else padded(rows)
        launch(
            _advance,
            (batch * heads, ceil_div(rows, block), ceil_div(columns, config.columns)),
            (
                k, v, log_decay, state, at if isinstance(at, Tensor) else None, *k.stride()[:3], *v.stride()[:3],
                heads, heads // k.shape[1], heads // v.shape[1], tokens, tile, 0 if isinstance(at, Tensor) else at,
                rows, columns, 1.0,
            ),
            {
                "OWN": sums, "CHUNK": config.chunk, "ROWS": block, "COLUMNS": config.columns, "PARTS": parts.inputs,
                "WEIGHTED_PARTS": parts.weighted, "BY_TOKEN": log_decay.ndim > 1,
            },
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    walked.masked_fill_(lost_columns(k, v, heads), math.nan)


@triton.jit(do_not_specialize=COUNTS)
def _advance(
    b, c, log_decay, state, where,
    b_batch, b_head, b_token, c_batch, c_head, c_token, heads, b_share, c_share, tokens, tile_size, at,
    rows, columns, scale,
    OWN: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    WEIGHTED_PARTS: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    UNITS: tl.constexpr = b.dtype.element_ty == tl.float32
    dtype: tl.constexpr = tl.float16 if UNITS else b.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    head, batch = program % heads, program // heads
    row, column = tl.program_id(1) * ROWS, tl.program_id(2) * COLUMNS
    b += batch * b_batch + head // b_share * b_head
    c += batch * c_batch + head // c_share * c_head
    gate = gate_of(log_decay, batch, head, heads, 0, tokens, BY_TOKEN)
    first = 0
    if where is not None:
        at = tl.load(where + batch).to(tl.int32)
    if OWN and not BY_TOKEN:
        first = first_chunk(gate, tl.cdiv(tile_size, CHUNK), tile_size, CHUNK)
    i, j = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    pointers, inside = state + program * rows * columns + i * columns + j, (i < rows) & (j < columns)
    held = tl.load(pointers, mask=inside, other=0.0)
    for step in range(tl.cdiv(tokens, CHUNK)):
        offset = step * CHUNK
        count = tl.minimum(tokens - offset, CHUNK).to(tl.int32)
        b_i = load_chunk(b, b_token, offset, count, row, rows, CHUNK, ROWS)
        c_i = load_chunk(c, c_token, offset, count, column, columns, CHUNK, COLUMNS)
        if OWN:
            if not BY_TOKEN:
                # What a full tile does not read of its tokens is left out from here on.
                held = tl.where((first > 0) & (at + offset == first * CHUNK), 0.0, held)
            held = summed(held, b_i, c_i, gate, offset, count, scale, False, CHUNK, PARTS, WEIGHTED_PARTS, BY_TOKEN)
        else:
            weight = weights_to_state(gate, offset, count, False, CHUNK, BY_TOKEN)
            b_i, c_i, _, _, weight, added_unit = in_units(b_i, c_i, weight, scale, UNITS)
            weighted, w_small = in_parts(tl.trans(b_i.to(tl.float32) * weight[:, None]), dtype, WEIGHTED_PARTS)
            c_i, c_small = in_parts(c_i, dtype, PARTS)
            held += held * lost_across(gate, offset, count, BY_TOKEN)
            held += product(weighted, w_small, c_i, c_small, WEIGHTED_PARTS, PARTS) * added_unit
    tl.store(pointers, held, mask=inside)
