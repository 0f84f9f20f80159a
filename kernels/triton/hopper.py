"""The outputs of a tile on Hopper (sm_90), in Gluon: asynchronous wgmma and bulk tensor copies, scheduled by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from leetdist.kernels.tiles import Tiles


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Bulk copies of `rows` tokens of one head of x (B, H, N, D)."""
    sizes, strides = list(x.shape), list(x.stride())
    if x.data_ptr() % 16 or any(stride % 8 or not stride for size, stride in zip(sizes[:3], strides[:3]) if size > 1):
        x = x.contiguous()
        strides = list(x.stride())
    strides = [s if n > 1 else x.shape[-1] * 8 for n, s in zip(sizes[:3], strides[:3])] + [1]
    block = [1, 1, rows, x.shape[-1]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor(x, sizes, strides, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def serves(rows: int, columns: int, dtype: torch.dtype, tile: int) -> bool:
    return dtype == torch.bfloat16 and {rows, columns} <= {64, 128} and tile >= rows


def tile_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    out: Tensor,
    *,
    reverse: bool,
    scale: float,
    state_scale: float,
    stages: int = 0,
) -> None:
    batch, heads = a.shape[0], log_decay.shape[0]
    rows, columns = a.shape[3], c.shape[3]
    chunk, warps = (128, 8) if rows == 128 else (64, 4)
    stages = stages or (2 if rows == 128 else 3)
    table = None if tiles.regular else tiles.table(a.device)
    tile_outputs_kernel[(batch * heads * tiles.count,)](
        _descriptor(a, chunk), _descriptor(b, chunk), _descriptor(c, chunk), states, log_decay, out, table,
        *out.stride()[:3], *states.stride(), heads, heads // a.shape[1], heads // b.shape[1], heads // c.shape[1],
        a.shape[2], tiles.count, scale, state_scale,
        TILE=tiles.size, REGULAR=tiles.regular, REVERSE=reverse, CHUNK=chunk,
        ROWS=rows, COLUMNS=columns, STAGES=stages, num_warps=warps,
    )  # fmt: skip


@gluon.jit
def _exp2(x):
    """2^x; below 2^-126, zero."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _fetch(desc, batch, head, token, ready, shared, more):
    tma.async_copy_global_to_shared(desc, [batch, head, token, 0], ready, shared, pred=more)


@gluon.jit
def _zero_rows(shared, count, layout: gl.constexpr):
    """Zero the rows from `count` on: they are another document's, or nobody's."""
    x = shared.load(layout)
    row = gl.arange(0, shared.shape[0], gl.SliceLayout(1, layout))
    shared.store(gl.where((row < count)[:, None], x, gl.zeros_like(x)))


@gluon.jit
def tile_outputs_kernel(
    a, b, c, states, log_decay, out, table,
    out_batch, out_head, out_token, state_batch, state_head, state_tile, state_row, state_column,
    heads, a_share, b_share, c_share, tokens, tiles, scale, state_scale,
    TILE: gl.constexpr, REGULAR: gl.constexpr, REVERSE: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    LOG2E: gl.constexpr = 1.4426950408889634
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, COLUMNS, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, CHUNK, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [num_warps, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    dtype: gl.constexpr = a.dtype
    BY_ROWS: gl.constexpr = out.dtype.element_ty == dtype and ROWS == COLUMNS

    program = gl.program_id(0).to(gl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    if REGULAR:
        start = tile * TILE
        length = gl.minimum(tokens - start, TILE).to(gl.int32)
    else:
        start = gl.load(table + 2 * tile)
        length = gl.load(table + 2 * tile + 1).to(gl.int32)
    chunks = gl.cdiv(length, CHUNK)
    first = start.to(gl.int32)
    batch32 = batch.to(gl.int32)
    a_head, b_head = (head // a_share).to(gl.int32), (head // b_share).to(gl.int32)
    c_head = (head // c_share).to(gl.int32)

    a_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, CHUNK, ROWS], a.layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, CHUNK, ROWS], b.layout)
    c_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, CHUNK, COLUMNS], c.layout)
    held = gl.allocate_shared_memory(
        dtype, [ROWS, COLUMNS], gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], dtype)
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    BYTES: gl.constexpr = (2 * ROWS + COLUMNS) * CHUNK * 2
    for s in gl.static_range(STAGES):
        where = first + (chunks - 1 - s if REVERSE else s) * CHUNK
        bar = ready.index(s)
        mbarrier.expect(bar, BYTES, pred=s < chunks)
        _fetch(a, batch32, a_head, where, bar, a_ring.index(s), s < chunks)
        _fetch(b, batch32, b_head, where, bar, b_ring.index(s), s < chunks)
        _fetch(c, batch32, c_head, where, bar, c_ring.index(s), s < chunks)

    states += batch * state_batch + head * state_head + tile * state_tile
    i = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))[:, None]
    j = gl.arange(0, COLUMNS, gl.SliceLayout(0, WIDE))[None, :]
    state = gl.load(states + i * state_row + j * state_column)
    held.store(state.to(dtype))
    fence_async_shared()

    out += batch * out_batch + head * out_head
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, SCORES))
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, SCORES))
    wide_row = gl.arange(0, CHUNK, gl.SliceLayout(1, WIDE))
    left_column = gl.arange(0, CHUNK, gl.SliceLayout(0, LEFT))
    store_row = gl.arange(0, CHUNK, gl.SliceLayout(1, STORE))
    store_column = gl.arange(0, COLUMNS, gl.SliceLayout(0, STORE))

    for step in range(chunks):
        stage, phase = step % STAGES, (step // STAGES) & 1
        offset = (chunks - 1 - step if REVERSE else step) * CHUNK
        count = gl.minimum(length - offset, CHUNK)
        # Read anew in each chunk, so that the decays are computed anew too: held, they would cost 64 registers.
        g = gl.load(log_decay + head, volatile=True) * LOG2E
        a_i = a_ring.index(stage).reshape([CHUNK, ROWS])
        b_i = b_ring.index(stage).reshape([CHUNK, ROWS])
        c_i = c_ring.index(stage).reshape([CHUNK, COLUMNS])
        # Before any product is under way: a register that one may write cannot be used without waiting for it.
        state = state * _exp2(g * count.to(gl.float32))
        mbarrier.wait(ready.index(stage), phase)
        if count < CHUNK:
            _zero_rows(a_i, count, FLAT)
            _zero_rows(b_i, count, FLAT)
            _zero_rows(c_i, count, FLAT)
            fence_async_shared()
            gl.thread_barrier()

        scores = gl.zeros([CHUNK, CHUNK], gl.float32, SCORES)
        scores = warpgroup_mma(a_i, b_i.permute((1, 0)), scores, use_acc=False, is_async=True)

        # Meanwhile: b^T, weighted by the steps from each token to the state at the chunk's end.
        b_t = b_i.permute((1, 0)).load(LEFT)
        exponent = left_column + 1 if REVERSE else gl.maximum(count - 1 - left_column, 0)
        b_t = (b_t.to(gl.float32) * _exp2(g * exponent.to(gl.float32))[None, :]).to(dtype)
        state = warpgroup_mma(b_t, c_i, state, is_async=True)

        scores = warpgroup_mma_wait(1, [scores])
        moved = row + gl.where(g > 0, 1, 0)  # adds nothing, but is not known before the loop
        distance = column[None, :] - moved[:, None] if REVERSE else moved[:, None] - column[None, :]
        steps = (distance + 0x4B000000).to(gl.float32, bitcast=True) - 8388608.0
        decay = gl.where(distance >= 0, _exp2(g * steps), 0.0)
        left = gl.convert_layout((scores * decay * scale).to(dtype), LEFT)

        o = gl.zeros([CHUNK, COLUMNS], gl.float32, WIDE)
        o = warpgroup_mma(a_i, held, o, use_acc=False, is_async=True)
        exponent = gl.maximum(count - 1 - wide_row, 0) if REVERSE else wide_row + 1
        from_state = _exp2(g * exponent.to(gl.float32)) * state_scale
        o, state = warpgroup_mma_wait(0, [o, state])
        o = o * from_state[:, None]
        o = warpgroup_mma(left, c_i, o, is_async=True)
        gl.thread_barrier()  # all have read `held`
        held.store(state.to(dtype))
        fence_async_shared()
        o = warpgroup_mma_wait(0, [o])

        # The outputs leave through the memory of `a`, so that whole rows are written.
        if BY_ROWS:
            a_i.store(o.to(dtype))
        fence_async_shared()
        gl.thread_barrier()  # all have read `b` and `c`, and written `a`
        token = first + (chunks - 1 - step - STAGES if REVERSE else step + STAGES) * CHUNK
        more = step + STAGES < chunks
        mbarrier.expect(ready.index(stage), BYTES, pred=more)
        _fetch(b, batch32, b_head, token, ready.index(stage), b_ring.index(stage), more)
        _fetch(c, batch32, c_head, token, ready.index(stage), c_ring.index(stage), more)
        if BY_ROWS:
            rows = a_i.load(STORE)
            gl.thread_barrier()
            pointers = out + (start + offset + store_row)[:, None] * out_token + store_column[None, :]
            gl.store(pointers, rows, mask=(store_row < count)[:, None])
        else:
            pointers = out + (start + offset + wide_row)[:, None] * out_token + j
            gl.store(pointers, o.to(out.dtype.element_ty), mask=(wide_row < count)[:, None])
        _fetch(a, batch32, a_head, token, ready.index(stage), a_ring.index(stage), more)
