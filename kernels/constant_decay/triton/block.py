"""The local primitives in Triton, for NVIDIA GPUs: same steps, shapes and meaning as constant_decay.pytorch.block.

Every program owns one tile of one head (and some columns of its state) and walks it chunk by chunk with the state in
registers, so nothing but the state at each tile's start reaches memory. All offsets that grow with the sequence are
64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.memory import empty_outputs, empty_states, heads_of
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.constant_decay.triton.configs import Config, block_config, padded, parts_of
from leetdist.kernels.constant_decay.triton.decay import decay_gradient
from leetdist.kernels.constant_decay.triton.fold import fold
from leetdist.kernels.constant_decay.triton.parts import (
    LARGE,
    SMALLEST,
    in_parts,
    load_chunk,
    not_finite,
    power_of_2,
    product,
    seen_from,
    unit,
    units,
)
from leetdist.kernels.constant_decay.triton.tiles import COUNTS, span
from leetdist.kernels.constant_decay.triton.weights import (
    gate_of,
    lost_across,
    seen_weights,
    weight_across,
    weights_from_state,
    weights_to_state,
)
from leetdist.kernels.runtime.triton_launch import launch

__all__ = ["decay_gradient", "fold", "tile_outputs", "tile_states"]

# exp(-x) is 0 in fp32 for x from here on.
FP32_RANGE = tl.constexpr(104.0)


def tile_states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float = 1.0,
    to_end: bool = True,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_states; `precision` is that of `linear_attention`.

    Instead of (H,) log-decays, sums of a decay a token (leetdist.kernels.token_decay.triton.sums.token_sums).
    """
    batch, heads = b.shape[0], heads_of(log_decay)
    rows, columns = b.shape[3], c.shape[3]
    config = block_config(rows, columns, b.dtype, tiles.size)
    if out is None:
        out = empty_states(b, c, log_decay, tiles)
    parts, unread = parts_of(b.dtype, precision), tiles.unread(reverse, to_end)
    block_rows = states_block(rows, config)
    grid = (batch * heads * tiles.count, ceil_div(rows, block_rows), ceil_div(columns, config.columns))
    if out.numel():
        launch(
            _tile_states,
            grid,
            (
                b, c, log_decay, out, tiles.needed_table(b.device),
                *b.stride()[:3], *c.stride()[:3], out.stride(2), heads, heads // b.shape[1], heads // c.shape[1],
                b.shape[2], tiles.count, tiles.size, unread, rows, columns, scale,
            ),
            {
                "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": config.chunk, "ROWS": block_rows,
                "COLUMNS": config.columns, "PARTS": parts.inputs, "WEIGHTED_PARTS": parts.weighted,
                "BY_TOKEN": log_decay.ndim > 1,
            },
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


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
    precision: str | None = None,
) -> Tensor:
    """See constant_decay.pytorch.block.tile_outputs. `states` may be a transposed view; the others as above. onto: as
    `out`, in fp32: the outputs are added to it before they are rounded."""
    batch, heads = a.shape[0], heads_of(log_decay)
    rows, columns = a.shape[3], c.shape[3]
    parts = parts_of(a.dtype, precision)
    config = block_config(rows, columns, a.dtype, tiles.size, parts)
    if out is None:
        out = empty_outputs(a, c, log_decay, out_dtype)
    grid = (batch * heads * tiles.count, ceil_div(columns, config.columns))
    if out.numel():
        launch(
            _tile_outputs,
            grid,
            (
                a, b, c, states, log_decay, out, onto, tiles.needed_table(a.device),
                *a.stride()[:3], *b.stride()[:3], *c.stride()[:3], *out.stride()[:3],
                *((0, 0, 0) if onto is None else onto.stride()[:3]), *states.stride(),
                heads, heads // a.shape[1], heads // b.shape[1], heads // c.shape[1],
                a.shape[2], tiles.count, tiles.size, rows, columns, scale, state_scale,
                scale_of_added(scale, state_scale),
            ),
            {
                "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": config.chunk, "ROWS": padded(rows),
                "COLUMNS": config.columns, "PARTS": parts.inputs, "STATE_PARTS": parts.state,
                "SCORE_PARTS": parts.scores, "WEIGHTED_PARTS": parts.weighted, "BY_TOKEN": log_decay.ndim > 1,
            },
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


def states_block(rows: int, config: Config) -> int:
    """Rows of the state that one program of tile_states sums: 128 x 64 at most, beside the operands."""
    return min(padded(rows), 2 * config.columns)


def configuration(rows: int, columns: int, dtype: torch.dtype, tile: int, precision: str | None) -> str:
    """What `explain` says of these kernels."""
    parts = parts_of(dtype, precision)
    config = block_config(rows, columns, dtype, tile, parts)
    split = "" if parts.inputs == parts.state == 1 else f", operands in up to {max(parts.inputs, parts.state)} parts"
    return f"chunks of {config.chunk} tokens, {config.columns} columns and {config.warps} warps a program{split}"


@triton.jit(do_not_specialize=COUNTS)
def _tile_states(
    b, c, log_decay, out, table,
    b_batch, b_head, b_token, c_batch, c_head, c_token, out_tile, heads, b_share, c_share,
    tokens, tiles, tile_size, unread, rows, columns, scale,
    REGULAR: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, WEIGHTED_PARTS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    row, column = tl.program_id(1) * ROWS, tl.program_id(2) * COLUMNS
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    b += batch * b_batch + head // b_share * b_head
    c += batch * c_batch + head // c_share * c_head
    gate = gate_of(log_decay, batch, head, heads, start, tokens, BY_TOKEN)

    state = tl.zeros((ROWS, COLUMNS), tl.float32)
    chunks = tl.where(tile == unread, 0, tl.cdiv(length, CHUNK))
    first = 0
    if not BY_TOKEN:
        first = first_chunk(gate, chunks, tile_size, CHUNK)
    for step in range(first, chunks):
        offset = (chunks - 1 - step if REVERSE else step) * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        b_i = load_chunk(b, b_token, start + offset, count, row, rows, CHUNK, ROWS)
        c_i = load_chunk(c, c_token, start + offset, count, column, columns, CHUNK, COLUMNS)
        state = summed(state, b_i, c_i, gate, offset, count, scale, REVERSE, CHUNK, PARTS, WEIGHTED_PARTS, BY_TOKEN)

    i, j = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + program * out_tile + i * columns + j, state, mask=(i < rows) & (j < columns))


@triton.jit
def first_chunk(log_decay, chunks, tile_size, CHUNK: tl.constexpr):
    """The first chunk that the sum of a tile of so many reads. Tokens so far from the state that gamma^distance is 0 in
    fp32 are not read: with the usual slopes, half of them."""
    reach = FP32_RANGE / tl.maximum(-log_decay, 1e-9)
    reach = tl.minimum(reach, tile_size * 1.0).to(tl.int32)
    return tl.maximum(chunks - 1 - tl.cdiv(reach, CHUNK), 0)


@triton.jit
def summed(
    state, b_i, c_i, gate, offset, count, scale,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, WEIGHTED_PARTS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """The sum of a tile's own tokens, one chunk further."""
    UNITS: tl.constexpr = b_i.dtype == tl.float32
    dtype: tl.constexpr = tl.float16 if UNITS else b_i.dtype
    weight = weights_to_state(gate, offset, count, REVERSE, CHUNK, BY_TOKEN)
    factor = scale
    if BY_TOKEN and REVERSE and dtype == tl.float16:
        # The first token's is the largest, and fp16 would lose all of a chunk that begins with a strong decay.
        largest = power_of_2(weight_across(gate, offset, 1))
        weight /= largest
        factor *= largest
    if UNITS:
        b_unit, b_inverse = unit(b_i)
        c_unit, c_inverse = unit(c_i)
        c_i *= c_inverse
        weight *= b_inverse
        factor *= b_unit * c_unit
    b_i, b_small = in_parts(tl.trans(b_i.to(tl.float32) * weight[:, None]), dtype, WEIGHTED_PARTS)
    c_i, c_small = in_parts(c_i, dtype, PARTS)
    state += state * lost_across(gate, offset, count, BY_TOKEN)
    return state + product(b_i, b_small, c_i, c_small, WEIGHTED_PARTS, PARTS) * factor


@triton.jit
def in_units(b_i, c_i, weight, added_scale, UNITS: tl.constexpr):
    """Tokens of b and c in units of their own, these, and the tokens' weights on the way to the state in a common unit,
    which is times added_scale."""
    b_unit, c_unit, added_unit = 1.0, 1.0, added_scale
    if UNITS:
        b_unit, inverse = units(b_i)
        b_i *= inverse[:, None]
        c_unit, inverse = units(c_i)
        c_i *= inverse[:, None]
        bc_unit = b_unit * c_unit
        added_unit = tl.maximum(tl.max(bc_unit, 0), SMALLEST)
        weight *= bc_unit / added_unit
        added_unit *= added_scale
    return b_i, c_i, b_unit, c_unit, weight, added_unit


@triton.jit
def _walk_outputs(
    a, b, c, states, gate, out, onto, a_token, b_token, c_token, out_token, onto_token, state_row, state_column,
    start, length, column, rows, columns, scale, state_scale, added_scale,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    STATE_PARTS: tl.constexpr, SCORE_PARTS: tl.constexpr, WEIGHTED_PARTS: tl.constexpr,
    BY_TOKEN: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """The outputs of a tile, and the last state. AGAIN: with zeros for what is not finite in b, c and the state, and
    NaN from there on, in its column of c and of the state, for a row of b in all."""
    UNITS: tl.constexpr = a.dtype.element_ty == tl.float32
    dtype: tl.constexpr = tl.float16 if UNITS else a.dtype.element_ty
    i, j = tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    inside = (i < rows) & (j < columns)
    state = tl.load(states + i * state_row + j * state_column, mask=inside, other=0.0)

    position = tl.arange(0, CHUNK)
    # AGAIN: where in a chunk, in the order of the walk, each column is lost; behind the chunk where it is not yet.
    walked = CHUNK - 1 - position if REVERSE else position
    lost_from = tl.zeros((COLUMNS,), tl.int32) + CHUNK
    if AGAIN:
        lost_from = tl.where(tl.max(not_finite(state).to(tl.int32), 0) > 0, 0, lost_from)
        state = tl.where(not_finite(state), 0.0, state)
    j = column + tl.arange(0, COLUMNS)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(chunks):
        offset = (chunks - 1 - step if REVERSE else step) * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        a_i = load_chunk(a, a_token, start + offset, count, 0, rows, CHUNK, ROWS)
        b_i = load_chunk(b, b_token, start + offset, count, 0, rows, CHUNK, ROWS)
        c_i = load_chunk(c, c_token, start + offset, count, column, columns, CHUNK, COLUMNS)
        if AGAIN:
            lost_b, lost_c = not_finite(b_i), not_finite(c_i)
            b_i, c_i = tl.where(lost_b, 0.0, b_i).to(b_i.dtype), tl.where(lost_c, 0.0, c_i).to(c_i.dtype)
            lost_row = tl.max(lost_b.to(tl.int32), 1)[:, None] > 0
            lost_from = tl.minimum(lost_from, tl.min(tl.where(lost_c | lost_row, walked[:, None], CHUNK), 0))
        distance = seen_from(REVERSE, CHUNK)
        sees = distance >= 0
        decay = tl.where(sees, seen_weights(gate, offset, count, distance, REVERSE, CHUNK, BY_TOKEN), 0.0) * scale
        weight = weights_to_state(gate, offset, count, REVERSE, CHUNK, BY_TOKEN)
        from_state = weights_from_state(gate, offset, count, REVERSE, CHUNK, BY_TOKEN) * state_scale
        near_unit, s_unit, s_inverse = 1.0, 1.0, 1.0
        b_i, c_i, b_unit, c_unit, weight, added_unit = in_units(b_i, c_i, weight, added_scale, UNITS)
        if UNITS:
            a_unit, inverse = units(a_i)
            a_i *= inverse[:, None]
            bc_unit = b_unit * c_unit
            # The largest that a token sees; and a score in such units is below 4 LARGE^2 ROWS.
            largest = tl.max(tl.where(distance >= 0, bc_unit[None, :], SMALLEST), 1)
            decay *= bc_unit[None, :] / largest[:, None] / (LARGE * ROWS)
            near_unit = (a_unit * largest * (LARGE * ROWS))[:, None]
            from_state *= a_unit
        if dtype == tl.float16:  # a state can exceed fp16's range: it grows with the sequence
            s_unit, s_inverse = unit(state)
        a_i, a_small = in_parts(a_i, dtype, PARTS)
        weighted, w_small = in_parts(tl.trans(b_i.to(tl.float32) * weight[:, None]), dtype, WEIGHTED_PARTS)
        b_i, b_small = in_parts(b_i, dtype, PARTS)
        c_i, c_small = in_parts(c_i, dtype, PARTS)
        s_i, s_small = in_parts(state * s_inverse, dtype, STATE_PARTS)
        o = product(a_i, a_small, s_i, s_small, PARTS, STATE_PARTS) * (from_state * s_unit)[:, None]
        scores = product(a_i, a_small, tl.trans(b_i), tl.trans(b_small), PARTS, PARTS)
        seen, seen_small = in_parts(scores * decay, dtype, SCORE_PARTS)
        o += product(seen, seen_small, c_i, c_small, SCORE_PARTS, PARTS) * near_unit
        if AGAIN:
            o = tl.where(walked[:, None] >= lost_from[None, :], float("nan"), o)
            lost_from = tl.where(lost_from < CHUNK, 0, CHUNK)
        here = (position < count)[:, None] & (j < columns)[None, :]
        if onto is not None:
            o += tl.load(onto + (start + offset + position)[:, None] * onto_token + j[None, :], mask=here, other=0.0)
        pointers = out + (start + offset + position)[:, None] * out_token + j[None, :]
        tl.store(pointers, o.to(out.dtype.element_ty), mask=here)
        state += state * lost_across(gate, offset, count, BY_TOKEN)
        state += product(weighted, w_small, c_i, c_small, WEIGHTED_PARTS, PARTS) * added_unit
    return state


@triton.jit(do_not_specialize=COUNTS)
def _tile_outputs(
    a, b, c, states, log_decay, out, onto, table,
    a_batch, a_head, a_token, b_batch, b_head, b_token, c_batch, c_head, c_token, out_batch, out_head, out_token,
    onto_batch, onto_head, onto_token, state_batch, state_head, state_tile, state_row, state_column,
    heads, a_share, b_share, c_share, tokens, tiles, tile_size, rows, columns, scale, state_scale, added_scale,
    REGULAR: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, STATE_PARTS: tl.constexpr,
    SCORE_PARTS: tl.constexpr, WEIGHTED_PARTS: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    column = tl.program_id(1) * COLUMNS
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    a += batch * a_batch + head // a_share * a_head
    b += batch * b_batch + head // b_share * b_head
    c += batch * c_batch + head // c_share * c_head
    out += batch * out_batch + head * out_head
    if onto is not None:
        onto += batch * onto_batch + head * onto_head
    gate = gate_of(log_decay, batch, head, heads, start, tokens, BY_TOKEN)
    states += batch * state_batch + head * state_head + tile * state_tile
    state = _walk_outputs(
        a, b, c, states, gate, out, onto, a_token, b_token, c_token, out_token, onto_token, state_row, state_column,
        start, length, column, rows, columns, scale, state_scale, added_scale,
        REVERSE, CHUNK, ROWS, COLUMNS, PARTS, STATE_PARTS, SCORE_PARTS, WEIGHTED_PARTS, BY_TOKEN, AGAIN=False,
    )  # fmt: skip
    # A score of 0 times a NaN or an infinity of a later token is NaN. Each of these is in the last state too.
    if tl.max(not_finite(state).to(tl.int32)) > 0:
        _walk_outputs(
            a, b, c, states, gate, out, onto, a_token, b_token, c_token, out_token, onto_token, state_row, state_column,
            start, length, column, rows, columns, scale, state_scale, added_scale,
            REVERSE, CHUNK, ROWS, COLUMNS, PARTS, STATE_PARTS, SCORE_PARTS, WEIGHTED_PARTS, BY_TOKEN, AGAIN=True,
        )  # fmt: skip
