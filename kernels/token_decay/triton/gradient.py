"""The gradient of a decay a token in Triton.

The decay of token t scales what goes from tokens before it to tokens from it on, so its gradient is the sum of all that
goes so. Within a chunk, with S the state at its start, R the gradient of the state at its end, G the sums of log-decays
from its start to a token, and n its last:

    dg_t = sum_{j < t <= i} M_ij + sum_{i >= t} A_i + sum_{j < t} B_j + E
    M_ij = scale exp(G_i - G_j) (q_i . k_j) (v_j . do_i)     A_i = scale exp(G_i) q_i^T S do_i
    B_j  = exp(G_n - G_j) k_j^T R v_j                        E   = exp(G_n) <S, R>

No term is a difference of larger ones (the textbook's sum of q . dq - k . dk is one, and loses all digits of a strong
decay). E wants S and R of the same chunk, whose walks go in opposite directions: a program walks its tile forward and
keeps the states, then backward with R.

Operands of the products (leetdist.kernels.constant_decay.triton.parts): of fp32 two fp16 numbers in units; beside
16-bit inputs one number, but of tokens on their way to a state two, or states would be as inexact as their terms.

Source: Mamba-2, arXiv 2405.21060, appendix on gradients, for the form by chunks.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.launch import launch
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.triton.configs import Config, padded
from leetdist.kernels.constant_decay.triton.decay import _rounded_to_tf32
from leetdist.kernels.constant_decay.triton.fold import COUNTS, _span, _table
from leetdist.kernels.constant_decay.triton.parts import in_parts, load_chunk, product, unit
from leetdist.kernels.constant_decay.triton.weights import (
    gate_of,
    lost_across,
    seen_weights,
    weight_across,
    weights_from_state,
    weights_to_state,
)
from leetdist.kernels.token_decay.triton.sums import sums_of

# Bytes of kept states at most, where more than one program runs.
KEPT = 512 << 20


def decay_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    ends: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    scale: float,
) -> Tensor:
    """The gradient of log_decay: (B, H, N) fp32.

    q, k, v: (B, H or fewer, N, Dk or Dv), do: (B, H, N, Dv), fp32, bf16 or fp16; states, ends: (B, H, tiles.count, Dk,
    Dv) fp32, contiguous, the state at each tile's start and the gradient of the state at its end.
    """
    batch, heads, tokens, columns = do.shape
    rows = q.shape[3]
    config, parts = gradient_config(rows, columns, q.dtype, tiles.size), 2 if q.dtype == torch.float32 else 1
    out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    tasks = batch * heads * tiles.count
    if not tasks:
        return out
    chunks = ceil_div(min(tiles.size, tokens), config.chunk)
    place = parts * padded(rows) * config.columns
    programs = max(1, min(tasks, 2 * _processors(q.device), KEPT // (2 * place * chunks)))
    kept = torch.empty(programs, chunks, place, dtype=torch.float16 if parts == 2 else q.dtype, device=q.device)
    units = torch.empty(programs, chunks, dtype=torch.float32, device=q.device)
    launch(
        _decay_gradient,
        (programs,),
        (
            q, k, v, do, states, ends, sums_of(log_decay, tiles), out, kept, units, _table(tiles, q.device),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1],
            tokens, tiles.count, tiles.size, tasks, chunks, rows, columns, scale,
        ),
        {
            "REGULAR": tiles.regular, "CHUNK": config.chunk, "ROWS": padded(rows), "COLUMNS": config.columns,
            "PARTS": parts,
        },
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def gradient_config(rows: int, columns: int, dtype: torch.dtype, tile: int) -> Config:
    """As constant_decay.triton.configs.block_config: depends on head sizes and dtype, and fits into sm_80."""
    rows, columns = padded(rows), padded(columns)
    wide = dtype == torch.float32
    chunk = min(32 if wide and rows > 64 else 64, tile)
    held = min(columns, (32 if rows > 64 else 64) if wide else 32 if rows > 128 else 64)
    return Config(chunk=chunk, columns=held, warps=4 if rows < 64 else 8, stages=1)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    """How many programs are at work at a time: each keeps the states of one tile."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=[*COUNTS, "tasks", "chunks"])
def _decay_gradient(
    q, k, v, do, states, ends, log_decay, out, kept, units, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
    heads, q_share, k_share, v_share, tokens, tiles, tile_size, tasks, chunks, rows, columns, scale,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    kept += program * chunks * (PARTS * ROWS * COLUMNS)
    units += program * chunks
    for task in range(program, tasks, tl.num_programs(0).to(tl.int64)):
        tile, head, batch = task % tiles, task // tiles % heads, task // tiles // heads
        start, length = _span(table, tile, tokens, tile_size, REGULAR)
        gate = gate_of(log_decay, batch, head, heads, start, tokens, True)
        q_tile = q + batch * q_batch + head // q_share * q_head + start * q_token
        k_tile = k + batch * k_batch + head // k_share * k_head + start * k_token
        v_tile = v + batch * v_batch + head // v_share * v_head + start * v_token
        do_tile = do + batch * do_batch + head * do_head + start * do_token
        out_tile = out + (batch * heads + head) * tokens + start
        for column in range(0, columns, COLUMNS):
            # What the turn before has kept is read by now, and what it wrote can be.
            tl.debug_barrier()
            state = _load_state(states + task * rows * columns, rows, column, columns, ROWS, COLUMNS)
            _keep_states(
                k_tile, v_tile, state, gate, kept, units, k_token, v_token, length, rows, column, columns,
                CHUNK, ROWS, COLUMNS, PARTS,
            )  # fmt: skip
            tl.debug_barrier()
            gradient = _load_state(ends + task * rows * columns, rows, column, columns, ROWS, COLUMNS)
            _add_gradients(
                q_tile, k_tile, v_tile, do_tile, gradient, gate, out_tile, kept, units,
                q_token, k_token, v_token, do_token, length, rows, column, columns, scale,
                CHUNK, ROWS, COLUMNS, PARTS,
            )  # fmt: skip


@triton.jit
def _keep_states(
    k, v, state, gate, kept, units, k_token, v_token, length, rows, column, columns,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The state at each chunk's start, and its unit."""
    dtype: tl.constexpr = kept.dtype.element_ty
    place = kept  # one address: a block of them would take registers
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
        v_i = load_chunk(v, v_token, offset, count, column, columns, CHUNK, COLUMNS)
        weight = weights_to_state(gate, offset, count, False, CHUNK, True)
        k_i, k_small, k_unit = _weighted(k_i, weight, dtype)
        v_i, v_small, v_unit = _operand(v_i, dtype, PARTS == 2, PARTS)
        state += state * lost_across(gate, offset, count, True)
        state += product(k_i, k_small, v_i, v_small, 2, PARTS) * (k_unit * v_unit)


@triton.jit
def _add_gradients(
    q, k, v, do, gradient, gate, out, kept, units, q_token, k_token, v_token, do_token,
    length, rows, column, columns, scale,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of each token, from these columns; gradient: of the state at the tile's end."""
    dtype: tl.constexpr = kept.dtype.element_ty
    position = tl.arange(0, CHUNK)
    i, j = position[:, None], position[None, :]
    chunks = tl.cdiv(length, CHUNK)
    place = kept + chunks.to(tl.int64) * (PARTS * ROWS * COLUMNS)
    for step in range(chunks):
        chunk = chunks - 1 - step
        offset = chunk * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        place -= PARTS * ROWS * COLUMNS
        q_raw = load_chunk(q, q_token, offset, count, 0, rows, CHUNK, ROWS)
        k_raw = load_chunk(k, k_token, offset, count, 0, rows, CHUNK, ROWS)
        v_raw = load_chunk(v, v_token, offset, count, column, columns, CHUNK, COLUMNS)
        do_raw = load_chunk(do, do_token, offset, count, column, columns, CHUNK, COLUMNS)
        s_i = tl.load(place + _within(ROWS, COLUMNS))
        s_small = tl.load(place + ROWS * COLUMNS + _within(ROWS, COLUMNS)) if PARTS == 2 else s_i
        s_unit = tl.load(units + chunk)
        q_i, q_small, q_unit = _operand(q_raw, dtype, PARTS == 2, PARTS)
        k_i, k_small, k_unit = _operand(k_raw, dtype, PARTS == 2, PARTS)
        v_i, v_small, v_unit = _operand(v_raw, dtype, PARTS == 2, PARTS)
        do_i, do_small, do_unit = _operand(do_raw, dtype, PARTS == 2, PARTS)
        r_i, r_small, r_unit = _operand(gradient, dtype, dtype == tl.float16, PARTS)

        scores = product(q_i, q_small, tl.trans(k_i), tl.trans(k_small), PARTS, PARTS) * (q_unit * k_unit * scale)
        scores *= seen_weights(gate, offset, count, i - j, False, CHUNK, True)
        pairs = product(do_i, do_small, tl.trans(v_i), tl.trans(v_small), PARTS, PARTS) * (do_unit * v_unit) * scores
        within = _sums_before_columns(tl.where(i > j, pairs, 0.0), CHUNK, PARTS)
        behind = product(k_i, k_small, r_i, r_small, PARTS, PARTS) * v_raw.to(tl.float32)
        behind = tl.sum(behind, 1) * (k_unit * r_unit) * weights_to_state(gate, offset, count, False, CHUNK, True)
        ahead = product(q_i, q_small, s_i, s_small, PARTS, PARTS) * do_raw.to(tl.float32)
        ahead = tl.sum(ahead, 1) * (q_unit * s_unit * scale)
        ahead *= weights_from_state(gate, offset, count, False, CHUNK, True)
        state = s_i.to(tl.float32)
        if PARTS == 2:
            state += s_small.to(tl.float32)
        across = tl.sum(state * gradient) * s_unit * weight_across(gate, offset, count)

        total = tl.sum(tl.where(i >= j, within + ahead[:, None], behind[:, None]), 0) + across
        here = position < count
        if column > 0:
            total += tl.load(out + offset + position, mask=here, other=0.0)
        tl.store(out + offset + position, total, mask=here)

        weight = weights_to_state(gate, offset, count, True, CHUNK, True) * scale
        q_i, q_small, q_unit = _weighted(q_raw, weight, dtype)
        gradient += gradient * lost_across(gate, offset, count, True)
        gradient += product(q_i, q_small, do_i, do_small, 2, PARTS) * (q_unit * do_unit)


@triton.jit
def _sums_before_columns(x, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """(CHUNK, CHUNK): of each row of x, the sum of what is before each column."""
    before = tl.where(tl.arange(0, CHUNK)[:, None] < tl.arange(0, CHUNK)[None, :], 1.0, 0.0)
    if PARTS == 2:
        return tl.dot(x, before, input_precision="ieee")
    else:
        return tl.dot(_rounded_to_tf32(x), before, input_precision="tf32")


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
