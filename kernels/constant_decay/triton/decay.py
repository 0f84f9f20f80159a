"""The gradient of log_decay in Triton: what each tile adds to it."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.memory import step_of
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.triton.configs import Config, block_config, padded
from leetdist.kernels.constant_decay.triton.parts import load_chunk, to_state
from leetdist.kernels.constant_decay.triton.tiles import COUNTS, decay_of, powers, span
from leetdist.kernels.runtime.triton_launch import launch

PART = 256  # tiles that a program of `_sum_blocks` has


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
    """See leetdist.kernels.constant_decay.pytorch.block.decay_gradient."""
    batch, heads = q.shape[0], log_decay.shape[0]
    rows, columns = q.shape[3], v.shape[3]
    config = block_config(rows, columns, q.dtype, tiles.size)
    held = slope_columns(config)
    blocks = ceil_div(columns, held)
    out = torch.empty(batch, heads, tiles.count, blocks, dtype=torch.float64, device=q.device)
    if out.numel():
        launch(
            _decay_gradient,
            (batch * heads * tiles.count, blocks),
            (
                q, k, v, do, states, step_of(states), state_grads, step_of(state_grads), log_decay, out,
                tiles.needed_table(q.device),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
                heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1],
                q.shape[2], tiles.count, tiles.size, rows, columns, scale,
            ),
            {
                "REGULAR": tiles.regular, "CHUNK": config.chunk, "ROWS": padded(rows), "COLUMNS": held,
                "DOUBLE": q.dtype == torch.float32 and _multiplies_doubles(q.device),
            },
            num_warps=4 if padded(rows) < 64 else 8, num_stages=1,
        )  # fmt: skip
    return _over_blocks(out)


def _over_blocks(shares: Tensor) -> Tensor:
    """The sum over the last dimension, in one fixed order, which torch.sum does not promise; by a launch, which is
    repeated with the others."""
    blocks = shares.shape[-1]
    if blocks == 1:
        return shares[..., 0]
    total = torch.empty(shares.shape[:-1], dtype=shares.dtype, device=shares.device)
    if total.numel():
        grid = (ceil_div(total.numel(), PART),)
        launch(_sum_blocks, grid, (shares, total, total.numel()), {"BLOCKS": blocks, "PART_": PART}, num_warps=4)
    return total


@cache
def _multiplies_doubles(device: torch.device) -> bool:
    """Whether Triton compiles fp64 products for the chip: 3.6 fails to for Blackwell's."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0)


def slope_columns(config: Config) -> int:
    """Columns that one program of decay_gradient carries: it holds two states, so half of one."""
    return max(16, config.columns // 2)


@triton.jit(do_not_specialize=["count"])
def _sum_blocks(shares, total, count, BLOCKS: tl.constexpr, PART_: tl.constexpr):
    i = tl.program_id(0) * PART_ + tl.arange(0, PART_)
    found = tl.load(shares + i * BLOCKS, mask=i < count)
    for block in tl.static_range(1, BLOCKS):
        found += tl.load(shares + i * BLOCKS + block, mask=i < count)
    tl.store(total + i, found, mask=i < count)


@triton.jit
def _product(a, b, DOUBLE: tl.constexpr):
    """a . b; of fp32 in fp64, which has matrix units of its own and spills less than fp32 without them: terms of both
    signs cancel, and a sum of 256 products in fp32 left an error of 2.5e-6."""
    if DOUBLE:
        return tl.dot(a.to(tl.float64), b.to(tl.float64))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _times_state(a, state, DOUBLE: tl.constexpr):
    """a . state.

    16 bits take the state as a sum of two numbers: rounding it to one would be the largest error of a head with a long
    memory. A state can exceed fp16's range (it grows with the sequence), so beside fp16 the two are tf32 numbers, with
    fp16's mantissa and fp32's range.
    """
    if a.dtype == tl.float16:
        wide, high = a.to(tl.float32), rounded_to_tf32(state)
        product = tl.dot(wide, state - high, acc=tl.dot(wide, high, input_precision="tf32"), input_precision="tf32")
    elif a.dtype == tl.bfloat16:
        high = state.to(tl.bfloat16)
        product = tl.dot(a, (state - high.to(tl.float32)).to(tl.bfloat16), acc=tl.dot(a, high))
    else:
        product = _product(a, state, DOUBLE)
    return product


@triton.jit
def _weighted_sum(k, weight, v, DOUBLE: tl.constexpr):
    """sum_i weight_i k_i v_i^T.

    In 16 bits, a weighted key is a sum of two numbers: the rounding of one alone would be most of the gradient's error.
    """
    weighted = k.to(tl.float32) * weight[:, None]
    high = weighted.to(k.dtype)
    total = _product(tl.trans(high), v, DOUBLE)
    if k.dtype != tl.float32:
        total = tl.dot(tl.trans((weighted - high.to(tl.float32)).to(k.dtype)), v, acc=total)
    return total.to(tl.float32)


@triton.jit
def rounded_to_tf32(x):
    """x to the nearest tf32; the matrix units would cut the low bits off, at twice the error and always toward zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=COUNTS)
def _decay_gradient(
    q, k, v, do, states, states_step, state_grads, grads_step, log_decay, out, table,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    do_batch, do_head, do_token, heads, q_share, k_share, v_share, tokens, tiles, tile_size, rows, columns, scale,
    REGULAR: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    column = tl.program_id(1) * COLUMNS
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    q += batch * q_batch + head // q_share * q_head
    k += batch * k_batch + head // k_share * k_head
    v += batch * v_batch + head // v_share * v_head
    do += batch * do_batch + head * do_head
    g = decay_of(log_decay, head)

    i, j = tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    inside = (i < rows) & (j < columns)
    element = i * columns + j
    state = tl.load(states + program * states_step + element, mask=inside, other=0.0)
    slope = tl.zeros((ROWS, COLUMNS), tl.float32)

    position = tl.arange(0, CHUNK)
    distance = position[:, None] - position[None, :]
    total = tl.zeros((CHUNK,), tl.float64)
    for step in range(tl.cdiv(length, CHUNK)):
        offset = step * CHUNK
        count = tl.minimum(length - offset, CHUNK)
        q_i = load_chunk(q, q_token, start + offset, count, 0, rows, CHUNK, ROWS)
        k_i = load_chunk(k, k_token, start + offset, count, 0, rows, CHUNK, ROWS)
        v_i = load_chunk(v, v_token, start + offset, count, column, columns, CHUNK, COLUMNS)
        do_i = load_chunk(do, do_token, start + offset, count, column, columns, CHUNK, COLUMNS)
        scores = _product(q_i, tl.trans(k_i), DOUBLE) * (powers(g, distance) * scale)
        seen = _product(do_i, tl.trans(v_i), DOUBLE)
        near = tl.sum(tl.where(distance > 0, scores * seen * distance.to(tl.float32), 0.0), 1)
        steps = (position + 1).to(tl.float32)
        far = _times_state(q_i, slope, DOUBLE) + _times_state(q_i, state, DOUBLE) * steps[:, None]
        far = tl.sum(far * do_i.to(far.dtype), 1) * powers(g, position + 1) * scale
        total += near.to(tl.float64) + far.to(tl.float64)
        # One factor of gamma is left to the sum, so that 16-bit weights do not all vanish under a strong decay.
        left = tl.maximum(count - 1 - position, 0)
        weight = powers(g, left - 1) * left.to(tl.float32)
        across = powers(g, count)
        slope = (slope + state * count.to(tl.float32)) * across
        slope += _weighted_sum(k_i, weight, v_i, DOUBLE) * tl.exp(g)
        state = state * across + _weighted_sum(k_i, to_state(g, count, False, CHUNK), v_i, DOUBLE)

    gradient = tl.load(state_grads + program * grads_step + element, mask=inside, other=0.0)
    # Both axes at once: Triton 3.6 fails to compile one after the other for Blackwell.
    share = tl.sum(total) + tl.sum((slope * gradient).to(tl.float64))
    tl.store(out + program * tl.num_programs(1) + tl.program_id(1), share)
