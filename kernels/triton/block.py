"""The local primitives in Triton, for NVIDIA GPUs: same steps, shapes and meaning as leetdist.kernels.pytorch.block.

Every program owns one tile of one head (and some columns of its state) and walks it chunk by chunk with the state in
registers, so nothing but the state at each tile's start reaches memory. All offsets that grow with the sequence are
64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.pytorch.block import scale_of_added
from leetdist.kernels.tiles import Tiles, ceil_div
from leetdist.kernels.triton.configs import Config, block_config, on_hopper, padded
from leetdist.kernels.triton.fold import COUNTS, _powers, _span, _table, fold
from leetdist.kernels.triton.launch import launch

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
    out: Tensor | None = None,
) -> Tensor:
    """See leetdist.kernels.pytorch.block.tile_states."""
    batch, heads = b.shape[0], log_decay.shape[0]
    rows, columns = b.shape[3], c.shape[3]
    config = block_config(rows, columns, b.dtype, tiles.size)
    if out is None:
        out = torch.empty(batch, heads, tiles.count, rows, columns, dtype=torch.float32, device=b.device)
    if on_hopper(rows, columns, b.dtype, tiles.size, b.device):
        from leetdist.kernels.triton import hopper

        if out.numel():
            hopper.tile_states(b, c, log_decay, tiles, out, reverse=reverse, scale=scale)
        return out
    block_rows = states_block(rows, config)
    grid = (batch * heads * tiles.count, ceil_div(rows, block_rows), ceil_div(columns, config.columns))
    if out.numel():
        launch(
            _tile_states,
            grid,
            (
                b, c, log_decay, out, _table(tiles, b.device),
                *b.stride()[:3], *c.stride()[:3], heads, heads // b.shape[1], heads // c.shape[1],
                b.shape[2], tiles.count, tiles.size, rows, columns, scale,
            ),
            {
                "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": config.chunk, "ROWS": block_rows,
                "COLUMNS": config.columns, "PRECISION": _precision(b.dtype),
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
) -> Tensor:
    """See leetdist.kernels.pytorch.block.tile_outputs. `states` may be a transposed view."""
    batch, heads = a.shape[0], log_decay.shape[0]
    rows, columns = a.shape[3], c.shape[3]
    config = block_config(rows, columns, a.dtype, tiles.size)
    if out is None:
        out = _empty_like_model(batch, heads, a.shape[2], columns, out_dtype, a)
    if on_hopper(rows, columns, a.dtype, tiles.size, a.device):
        from leetdist.kernels.triton import hopper

        if out.numel():
            hopper.tile_outputs(
                a, b, c, states, log_decay, tiles, out, reverse=reverse, scale=scale, state_scale=state_scale
            )
        return out
    grid = (batch * heads * tiles.count, ceil_div(columns, config.columns))
    if out.numel():
        launch(
            _tile_outputs,
            grid,
            (
                a, b, c, states, log_decay, out, _table(tiles, a.device),
                *a.stride()[:3], *b.stride()[:3], *c.stride()[:3], *out.stride()[:3], *states.stride(),
                heads, heads // a.shape[1], heads // b.shape[1], heads // c.shape[1],
                a.shape[2], tiles.count, tiles.size, rows, columns, scale, state_scale,
                scale_of_added(scale, state_scale),
            ),
            {
                "REGULAR": tiles.regular, "REVERSE": reverse, "CHUNK": config.chunk, "ROWS": padded(rows),
                "COLUMNS": config.columns, "PRECISION": _precision(a.dtype),
            },
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


def decay_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    state_grads: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    scale: float,
) -> Tensor:
    """See leetdist.kernels.pytorch.block.decay_gradient."""
    batch, heads = q.shape[0], log_decay.shape[0]
    rows, columns = q.shape[3], v.shape[3]
    config = block_config(rows, columns, q.dtype, tiles.size)
    held = slope_columns(config)
    blocks = ceil_div(columns, held)
    out = torch.empty(batch, heads, tiles.count, blocks, dtype=torch.float32, device=q.device)
    if out.numel():
        launch(
            _decay_gradient,
            (batch * heads * tiles.count, blocks),
            (
                q, k, v, do, states, state_grads, log_decay, out, _table(tiles, q.device),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
                heads, heads // k.shape[1], heads // v.shape[1],
                q.shape[2], tiles.count, tiles.size, rows, columns, scale,
            ),
            {
                "REGULAR": tiles.regular, "CHUNK": config.chunk, "ROWS": padded(rows), "COLUMNS": held,
                "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # terms of both signs cancel
            },
            num_warps=4 if padded(rows) < 64 else 8, num_stages=1,
        )  # fmt: skip
    total = out[..., 0]
    for block in range(1, blocks):  # in one fixed order, which torch.sum does not promise
        total = total + out[..., block]
    return total


def states_block(rows: int, config: Config) -> int:
    """Rows of the state that one program of tile_states sums: 128 x 64 at most, beside the operands."""
    return min(padded(rows), 2 * config.columns)


def slope_columns(config: Config) -> int:
    """Columns that one program of decay_gradient carries: it holds two states, so half of one."""
    return max(16, config.columns // 2)


def _precision(dtype: torch.dtype) -> str:
    """fp32 products as three tf32 products, which keep fp32's accuracy; 16-bit dtypes multiply as they are."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _empty_like_model(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """(B, H, N, D) laid out in memory as `like` is: a (B, N, H, D) model gets its own layout back."""
    if like.stride(1) < like.stride(2):
        return torch.empty(batch, tokens, heads, dim, dtype=dtype, device=like.device).transpose(1, 2)
    return torch.empty(batch, heads, tokens, dim, dtype=dtype, device=like.device)


@triton.jit
def _load(base, stride, first, count, column, columns, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """(CHUNK, COLUMNS) of the rows from `first` on, zero outside."""
    i, d = tl.arange(0, CHUNK), column + tl.arange(0, COLUMNS)
    pointers = base + (first + i)[:, None] * stride + d[None, :]
    return tl.load(pointers, mask=(i < count)[:, None] & (d < columns)[None, :], other=0.0)


@triton.jit
def _times_state(a, state, PRECISION: tl.constexpr):
    """a . state.

    bf16 takes the state as a sum of two bf16 numbers: rounding it to one would be the largest error of a head with a
    long memory. A state can exceed fp16's range (it grows with the sequence), so fp16 multiplies in tf32, with fp16's
    mantissa and fp32's range.
    """
    if a.dtype == tl.bfloat16:
        high = state.to(tl.bfloat16)
        low = (state - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(a, low, acc=tl.dot(a, high))
    else:
        if a.dtype == tl.float16:
            state = _rounded_to_tf32(state)
        return tl.dot(a.to(tl.float32), state, input_precision=PRECISION)


@triton.jit
def _rounded_to_tf32(x):
    """x to the nearest tf32; the matrix units would cut the low bits off, at twice the error and always toward zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _scores(a, b, log_decay, scale, REVERSE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """scale gamma^(i-j) a_i . b_j for the tokens j that i sees, else 0; fp32."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    distance = j - i if REVERSE else i - j
    decay = tl.where(distance >= 0, _powers(log_decay, distance), 0.0)
    return tl.dot(a, tl.trans(b), input_precision=PRECISION) * (decay * scale)


@triton.jit
def _to_state(b, log_decay, scale, count, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """b_i times scale times gamma^(steps from token i to the state at the chunk's end), in b's dtype."""
    i = tl.arange(0, CHUNK)
    exponent = i + 1 if REVERSE else count - 1 - i
    return (b.to(tl.float32) * (_powers(log_decay, exponent) * scale)[:, None]).to(b.dtype)


@triton.jit(do_not_specialize=COUNTS)
def _tile_states(
    b, c, log_decay, out, table,
    b_batch, b_head, b_token, c_batch, c_head, c_token, heads, b_share, c_share,
    tokens, tiles, tile_size, rows, columns, scale,
    REGULAR: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    row, column = tl.program_id(1) * ROWS, tl.program_id(2) * COLUMNS
    start, length = _span(table, tile, tokens, tile_size, REGULAR)
    b += batch * b_batch + head // b_share * b_head
    c += batch * c_batch + head // c_share * c_head
    g = tl.load(log_decay + head)

    state = tl.zeros((ROWS, COLUMNS), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    # Tokens so far from the state that gamma^distance is 0 in fp32 are not read: with the usual slopes, half of them.
    reach = tl.minimum(FP32_RANGE / tl.maximum(-g, 1e-9), tile_size * 1.0).to(tl.int32)
    for step in range(tl.maximum(chunks - 1 - tl.cdiv(reach, CHUNK), 0), chunks):
        offset = (chunks - 1 - step if REVERSE else step) * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        b_i = _load(b, b_token, start + offset, count, row, rows, CHUNK, ROWS)
        c_i = _load(c, c_token, start + offset, count, column, columns, CHUNK, COLUMNS)
        b_i = _to_state(b_i, g, scale, count, REVERSE, CHUNK)
        state = state * _powers(g, count) + tl.dot(tl.trans(b_i), c_i, input_precision=PRECISION)

    i, j = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + program * rows * columns + i * columns + j, state, mask=(i < rows) & (j < columns))


@triton.jit(do_not_specialize=COUNTS)
def _tile_outputs(
    a, b, c, states, log_decay, out, table,
    a_batch, a_head, a_token, b_batch, b_head, b_token, c_batch, c_head, c_token,
    out_batch, out_head, out_token, state_batch, state_head, state_tile, state_row, state_column,
    heads, a_share, b_share, c_share, tokens, tiles, tile_size, rows, columns, scale, state_scale, added_scale,
    REGULAR: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    column = tl.program_id(1) * COLUMNS
    start, length = _span(table, tile, tokens, tile_size, REGULAR)
    a += batch * a_batch + head // a_share * a_head
    b += batch * b_batch + head // b_share * b_head
    c += batch * c_batch + head // c_share * c_head
    out += batch * out_batch + head * out_head
    g = tl.load(log_decay + head)

    i, j = tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    states += batch * state_batch + head * state_head + tile * state_tile
    inside = (i < rows) & (j < columns)
    state = tl.load(states + i * state_row + j * state_column, mask=inside, other=0.0)

    position = tl.arange(0, CHUNK)
    j = column + tl.arange(0, COLUMNS)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(chunks):
        offset = (chunks - 1 - step if REVERSE else step) * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        a_i = _load(a, a_token, start + offset, count, 0, rows, CHUNK, ROWS)
        b_i = _load(b, b_token, start + offset, count, 0, rows, CHUNK, ROWS)
        c_i = _load(c, c_token, start + offset, count, column, columns, CHUNK, COLUMNS)
        scores = _scores(a_i, b_i, g, scale, REVERSE, CHUNK, PRECISION)
        from_state = _powers(g, count - 1 - position if REVERSE else position + 1) * state_scale
        o = _times_state(a_i, state, PRECISION) * from_state[:, None]
        o += tl.dot(scores.to(c_i.dtype), c_i, input_precision=PRECISION)
        pointers = out + (start + offset + position)[:, None] * out_token + j[None, :]
        tl.store(pointers, o.to(out.dtype.element_ty), mask=(position < count)[:, None] & (j < columns)[None, :])
        b_i = _to_state(b_i, g, added_scale, count, REVERSE, CHUNK)
        state = state * _powers(g, count) + tl.dot(tl.trans(b_i), c_i, input_precision=PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def _decay_gradient(
    q, k, v, do, states, state_grads, log_decay, out, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    do_batch, do_head, do_token, heads, k_share, v_share, tokens, tiles, tile_size, rows, columns, scale,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    column = tl.program_id(1) * COLUMNS
    start, length = _span(table, tile, tokens, tile_size, REGULAR)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // k_share * k_head
    v += batch * v_batch + head // v_share * v_head
    do += batch * do_batch + head * do_head
    g = tl.load(log_decay + head)

    i, j = tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    inside = (i < rows) & (j < columns)
    element = program * rows * columns + i * columns + j
    state = tl.load(states + element, mask=inside, other=0.0)
    slope = tl.zeros((ROWS, COLUMNS), tl.float32)

    position = tl.arange(0, CHUNK)
    distance = position[:, None] - position[None, :]
    total = tl.zeros((CHUNK,), tl.float32)
    for step in range(tl.cdiv(length, CHUNK)):
        offset = step * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        q_i = _load(q, q_token, start + offset, count, 0, rows, CHUNK, ROWS)
        k_i = _load(k, k_token, start + offset, count, 0, rows, CHUNK, ROWS)
        v_i = _load(v, v_token, start + offset, count, column, columns, CHUNK, COLUMNS)
        do_i = _load(do, do_token, start + offset, count, column, columns, CHUNK, COLUMNS)
        scores = _scores(q_i, k_i, g, scale, False, CHUNK, PRECISION)
        seen = tl.dot(do_i, tl.trans(v_i), input_precision=PRECISION)
        near = tl.sum(scores * seen * distance.to(tl.float32), 1)
        steps = (position + 1).to(tl.float32)
        far = _times_state(q_i, slope, PRECISION) + _times_state(q_i, state, PRECISION) * steps[:, None]
        far = tl.sum(far * do_i.to(tl.float32), 1) * _powers(g, position + 1) * scale
        total += near + far
        k_raw = k_i
        k_i = _to_state(k_i, g, 1.0, count, False, CHUNK)
        # One factor of gamma is left to the sum, so that 16-bit weights do not all vanish under a strong decay.
        left = tl.maximum(count - 1 - position, 0)
        weight = _powers(g, left - 1) * left.to(tl.float32)
        k_left = (k_raw.to(tl.float32) * weight[:, None]).to(k_raw.dtype)
        across = _powers(g, count)
        slope = (slope + state * count.to(tl.float32)) * across
        slope += tl.dot(tl.trans(k_left), v_i, input_precision=PRECISION) * tl.exp(g)
        state = state * across + tl.dot(tl.trans(k_i), v_i, input_precision=PRECISION)

    gradient = tl.load(state_grads + element, mask=inside, other=0.0)
    # Both axes at once: Triton 3.6 fails to compile one after the other for Blackwell.
    share = tl.sum(total) + tl.sum(slope * gradient)
    tl.store(out + program * tl.num_programs(1) + tl.program_id(1), share)
