"""The three walks of the gradient of a decay a token, in Triton: see leetdist.kernels.token_decay.triton.gradient,
which launches them. What a walk does for one tile is a function of its own, for kernels that walk some tiles again."""

from __future__ import annotations

import triton
import triton.language as tl

from leetdist.kernels.constant_decay.triton.decay import rounded_to_tf32
from leetdist.kernels.constant_decay.triton.parts import in_parts, load_chunk, product, unit
from leetdist.kernels.constant_decay.triton.tiles import COUNTS, span
from leetdist.kernels.constant_decay.triton.weights import (
    gate_of,
    lost_across,
    seen_weights,
    weight_across,
    weights_from_state,
    weights_to_state,
)

VARYING = [*COUNTS, "first", "chunks", "column"]


@triton.jit(do_not_specialize=VARYING)
def keep_states_kernel(
    k, v, states, states_step, log_decay, kept, units, table, k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, q_share, k_share, v_share, tokens, tiles, tile_size, first, chunks, column, rows, columns,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    keep_states(
        first + program, program, k, v, states, states_step, log_decay, kept, units, table, k_batch, k_head, k_token,
        v_batch, v_head, v_token, heads, k_share, v_share, tokens, tiles, tile_size, chunks, column, rows, columns,
        REGULAR, CHUNK, ROWS, COLUMNS, PARTS,
    )  # fmt: skip


@triton.jit
def keep_states(
    task, program, k, v, states, states_step, log_decay, kept, units, table,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, k_share, v_share, tokens, tiles, tile_size, chunks, column, rows, columns,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    v_weight=None, weight_batch=0, weight_head=0,
):  # fmt: skip
    """The state at each chunk's start, and its unit."""
    dtype: tl.constexpr = kept.dtype.element_ty
    tile, head, batch = task % tiles, task // tiles % heads, task // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    gate = gate_of(log_decay, batch, head, heads, start, tokens, True)
    k += batch * k_batch + head // k_share * k_head + start * k_token
    v += batch * v_batch + head // v_share * v_head + start * v_token
    if v_weight is not None:
        v_weight += batch * weight_batch + head * weight_head + start
    state = _load_state(states + task * states_step, rows, column, columns, ROWS, COLUMNS)
    place = kept + program * chunks * (PARTS * ROWS * COLUMNS)
    units += program * chunks
    for step in range(tl.cdiv(length, CHUNK)):
        offset = step * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        s_i, s_small, s_unit = _operand(state, dtype, dtype == tl.float16, PARTS)
        tl.store(place + _within(ROWS, COLUMNS), s_i)
        if PARTS == 2:
            tl.store(place + ROWS * COLUMNS + _within(ROWS, COLUMNS), s_small)
        place += PARTS * ROWS * COLUMNS
        tl.store(units + step, s_unit)
        k_i = load_chunk(k, k_token, offset, count, 0, rows, CHUNK, ROWS)
        v_i = _load_values(v, v_token, v_weight, offset, count, column, columns, CHUNK, COLUMNS)
        weight = weights_to_state(gate, offset, count, False, CHUNK, True)
        k_i, k_small, k_unit = _weighted(k_i, weight, dtype)
        v_i, v_small, v_unit = _operand(v_i, dtype, PARTS == 2, PARTS)
        state += state * lost_across(gate, offset, count, True)
        state += product(k_i, k_small, v_i, v_small, 2, PARTS) * (k_unit * v_unit)


@triton.jit(do_not_specialize=VARYING)
def add_inside_kernel(
    q, k, v, do, log_decay, out, kept, units, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
    heads, q_share, k_share, v_share, tokens, tiles, tile_size, first, chunks, column, rows, columns, scale,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    add_inside(
        first + program, program, tl.program_id(1), q, k, v, do, log_decay, out, kept, units, table,
        q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
        heads, q_share, k_share, v_share, tokens, tiles, tile_size, chunks, column, rows, columns, scale,
        REGULAR, CHUNK, ROWS, COLUMNS, PARTS, FIRST,
    )  # fmt: skip


@triton.jit
def add_inside(
    task, program, chunk, q, k, v, do, log_decay, out, kept, units, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
    heads, q_share, k_share, v_share, tokens, tiles, tile_size, chunks, column, rows, columns, scale,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    FIRST: tl.constexpr, v_weight=None, weight_batch=0, weight_head=0,
):  # fmt: skip
    """Of a chunk: M and A, what goes from tokens to tokens, and from the state at its start to tokens."""
    dtype: tl.constexpr = kept.dtype.element_ty
    tile, head, batch = task % tiles, task // tiles % heads, task // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    gate = gate_of(log_decay, batch, head, heads, start, tokens, True)
    q += batch * q_batch + head // q_share * q_head + start * q_token
    k += batch * k_batch + head // k_share * k_head + start * k_token
    v += batch * v_batch + head // v_share * v_head + start * v_token
    if v_weight is not None:
        v_weight += batch * weight_batch + head * weight_head + start
    do += batch * do_batch + head * do_head + start * do_token
    out += (batch * heads + head) * tokens + start
    offset = chunk * CHUNK
    if offset < length:
        count = tl.minimum(length - offset, CHUNK)
        position = tl.arange(0, CHUNK)
        i, j = position[:, None], position[None, :]
        q_i = load_chunk(q, q_token, offset, count, 0, rows, CHUNK, ROWS)
        k_i = load_chunk(k, k_token, offset, count, 0, rows, CHUNK, ROWS)
        v_i = _load_values(v, v_token, v_weight, offset, count, column, columns, CHUNK, COLUMNS)
        do_raw = load_chunk(do, do_token, offset, count, column, columns, CHUNK, COLUMNS)
        place = kept + (program * chunks + chunk) * (PARTS * ROWS * COLUMNS) + _within(ROWS, COLUMNS)
        s_i = tl.load(place)
        s_small = tl.load(place + ROWS * COLUMNS) if PARTS == 2 else s_i
        s_unit = tl.load(units + program * chunks + chunk)
        q_i, q_small, q_unit = _operand(q_i, dtype, PARTS == 2, PARTS)
        k_i, k_small, k_unit = _operand(k_i, dtype, PARTS == 2, PARTS)
        v_i, v_small, v_unit = _operand(v_i, dtype, PARTS == 2, PARTS)
        do_i, do_small, do_unit = _operand(do_raw, dtype, PARTS == 2, PARTS)
        scores = product(q_i, q_small, tl.trans(k_i), tl.trans(k_small), PARTS, PARTS) * (q_unit * k_unit * scale)
        scores *= seen_weights(gate, offset, count, i - j, False, CHUNK, True)
        pairs = product(do_i, do_small, tl.trans(v_i), tl.trans(v_small), PARTS, PARTS) * (do_unit * v_unit) * scores
        within = _sums_before_columns(tl.where(i > j, pairs, 0.0), CHUNK, PARTS)

        ahead = product(q_i, q_small, s_i, s_small, PARTS, PARTS) * do_raw.to(tl.float32)
        ahead = tl.sum(ahead, 1) * (q_unit * s_unit * scale)
        ahead *= weights_from_state(gate, offset, count, False, CHUNK, True)
        total = tl.sum(tl.where(i >= j, within + ahead[:, None], 0.0), 0)
        here = position < count
        if not FIRST:
            total += tl.load(out + offset + position, mask=here, other=0.0)
        tl.store(out + offset + position, total, mask=here)


@triton.jit(do_not_specialize=VARYING)
def add_behind_kernel(
    q, k, v, do, ends, ends_step, log_decay, out, kept, units, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
    heads, q_share, k_share, v_share, tokens, tiles, tile_size, first, chunks, column, rows, columns, scale,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    add_behind(
        first + program, program, q, k, v, do, ends, ends_step, log_decay, out, kept, units, table,
        q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
        heads, q_share, k_share, v_share, tokens, tiles, tile_size, chunks, column, rows, columns, scale,
        REGULAR, CHUNK, ROWS, COLUMNS, PARTS,
    )  # fmt: skip


@triton.jit
def add_behind(
    task, program, q, k, v, do, ends, ends_step, log_decay, out, kept, units, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
    heads, q_share, k_share, v_share, tokens, tiles, tile_size, chunks, column, rows, columns, scale,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    v_weight=None, weight_batch=0, weight_head=0,
):  # fmt: skip
    """Of a tile, backwards with the gradient of the state: B and E, what goes to the state at each chunk's end."""
    dtype: tl.constexpr = kept.dtype.element_ty
    tile, head, batch = task % tiles, task // tiles % heads, task // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    gate = gate_of(log_decay, batch, head, heads, start, tokens, True)
    q += batch * q_batch + head // q_share * q_head + start * q_token
    k += batch * k_batch + head // k_share * k_head + start * k_token
    v += batch * v_batch + head // v_share * v_head + start * v_token
    if v_weight is not None:
        v_weight += batch * weight_batch + head * weight_head + start
    do += batch * do_batch + head * do_head + start * do_token
    out += (batch * heads + head) * tokens + start
    gradient = _load_state(ends + task * ends_step, rows, column, columns, ROWS, COLUMNS)
    position = tl.arange(0, CHUNK)
    i, j = position[:, None], position[None, :]
    many = tl.cdiv(length, CHUNK)
    place = kept + (program * chunks + many) * (PARTS * ROWS * COLUMNS)
    units += program * chunks
    for step in range(many):
        chunk = many - 1 - step
        offset = chunk * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        here = position < count
        place -= PARTS * ROWS * COLUMNS
        # Loads first, as many as there are registers for.
        k_i = load_chunk(k, k_token, offset, count, 0, rows, CHUNK, ROWS)
        v_i = _load_values(v, v_token, v_weight, offset, count, column, columns, CHUNK, COLUMNS)
        total = tl.load(out + offset + position, mask=here, other=0.0)
        s_unit = tl.load(units + chunk)
        state = tl.load(place + _within(ROWS, COLUMNS)).to(tl.float32)
        if PARTS == 2:
            state += tl.load(place + ROWS * COLUMNS + _within(ROWS, COLUMNS)).to(tl.float32)
        across = tl.sum(state * gradient) * s_unit * weight_across(gate, offset, count)
        k_i, k_small, k_unit = _operand(k_i, dtype, PARTS == 2, PARTS)
        r_i, r_small, r_unit = _operand(gradient, dtype, dtype == tl.float16, PARTS)
        q_i = load_chunk(q, q_token, offset, count, 0, rows, CHUNK, ROWS)
        do_i = load_chunk(do, do_token, offset, count, column, columns, CHUNK, COLUMNS)
        behind = product(k_i, k_small, r_i, r_small, PARTS, PARTS) * v_i.to(tl.float32)
        behind = tl.sum(behind, 1) * (k_unit * r_unit) * weights_to_state(gate, offset, count, False, CHUNK, True)
        total += tl.sum(tl.where(i < j, behind[:, None], 0.0), 0) + across
        tl.store(out + offset + position, total, mask=here)

        weight = weights_to_state(gate, offset, count, True, CHUNK, True) * scale
        q_i, q_small, q_unit = _weighted(q_i, weight, dtype)
        do_i, do_small, do_unit = _operand(do_i, dtype, PARTS == 2, PARTS)
        gradient += gradient * lost_across(gate, offset, count, True)
        gradient += product(q_i, q_small, do_i, do_small, 2, PARTS) * (q_unit * do_unit)


@triton.jit
def _load_values(v, v_token, v_weight, offset, count, column, columns, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """A chunk of v, times its weights if there are some (leetdist.kernels.token_decay.triton.weighted)."""
    v_i = load_chunk(v, v_token, offset, count, column, columns, CHUNK, COLUMNS)
    if v_weight is not None:
        i = tl.arange(0, CHUNK)
        by = tl.load(v_weight + offset + i, mask=i < count, other=0.0)
        v_i = (v_i.to(tl.float32) * by[:, None]).to(v_i.dtype)
    return v_i


@triton.jit
def _sums_before_columns(x, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """(CHUNK, CHUNK): of each row of x, the sum of what is before each column."""
    before = tl.where(tl.arange(0, CHUNK)[:, None] < tl.arange(0, CHUNK)[None, :], 1.0, 0.0)
    if PARTS == 2:
        return tl.dot(x, before, input_precision="ieee")
    else:
        return tl.dot(rounded_to_tf32(x), before, input_precision="tf32")


@triton.jit
def _operand(x, dtype: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr):
    """x in parts, and the unit that they are in, 1 without UNITS."""
    x_unit = 1.0
    if UNITS:
        x_unit, inverse = unit(x)
        x *= inverse
    large, small = in_parts(x, dtype, PARTS)
    return large, small, x_unit


@triton.jit
def _weighted(x, weight, dtype: tl.constexpr):
    """Tokens on their way to a state, transposed, always in two parts, and their unit: see `_operand`."""
    x_unit = 1.0
    if x.dtype == tl.float32:
        x_unit, inverse = unit(x)
        weight *= inverse
    large, small = in_parts(tl.trans(x.to(tl.float32) * weight[:, None]), dtype, 2)
    return large, small, x_unit


@triton.jit
def _within(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _load_state(states, rows, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    return tl.load(states + i * columns + j, mask=(i < rows) & (j < columns), other=0.0)
