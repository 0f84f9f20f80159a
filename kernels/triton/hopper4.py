"""Variant 4."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from leetdist.kernels.triton.hopper_kernels import (
    COUNTS,
    LOG2E,
    _decayed,
    _exp2,
    _fetch,
    _from_state,
    _hold,
    _span,
    _two_parts,
    _write,
    _zero_rows,
)


@gluon.jit
def _zero_chunk(a, b, c, count, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    _zero_rows(a, count, ROWS)
    _zero_rows(b, count, ROWS)
    _zero_rows(c, count, COLUMNS)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit(do_not_specialize=COUNTS)
def tile_outputs_kernel(
    a, b, c, states, log_decay, out, table,
    out_batch, out_head, out_token, state_batch, state_head, state_tile, state_row, state_column,
    heads, a_share, b_share, c_share, tokens, tiles, tile_size, scale, state_scale, added_scale,
    REGULAR: gl.constexpr, REVERSE: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    # Eight warps: four have 16 rows each, for half of the columns; the other four have the other half.
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, COLUMNS // 2, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, CHUNK // 2, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [8, 1], [1, 0])
    FLAT_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // ROWS, ROWS // 8], [8, 1], [1, 0])
    dtype: gl.constexpr = a.dtype
    BY_ROWS: gl.constexpr = out.dtype.element_ty == dtype and ROWS == COLUMNS

    program = gl.program_id(0).to(gl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    start, length = _span(table, tile, tokens, tile_size, REGULAR)
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
    wide_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, COLUMNS], dtype)
    high = gl.allocate_shared_memory(dtype, [CHUNK, COLUMNS], wide_shared)
    low = gl.allocate_shared_memory(dtype, [CHUNK, COLUMNS], wide_shared)
    seen = gl.allocate_shared_memory(dtype, [CHUNK, CHUNK], gl.NVMMASharedLayout.get_default_for([CHUNK, CHUNK], dtype))
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

    g = gl.load(log_decay + head) * LOG2E
    states += batch * state_batch + head * state_head + tile * state_tile
    i = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))[:, None]
    j = gl.arange(0, COLUMNS, gl.SliceLayout(0, WIDE))[None, :]
    state = gl.load(states + i * state_row + j * state_column)
    unit = _hold(held, state)
    fence_async_shared()

    out += batch * out_batch + head * out_head
    before, count_before = start, 0

    for step in range(chunks):
        stage = step % STAGES
        offset = (chunks - 1 - step if REVERSE else step) * CHUNK
        count = gl.minimum(length - offset, CHUNK)
        a_i, b_i = a_ring.index(stage).reshape([CHUNK, ROWS]), b_ring.index(stage).reshape([CHUNK, ROWS])
        c_i = c_ring.index(stage).reshape([CHUNK, COLUMNS])
        # All that touches the state comes before products start: ptxas serializes them otherwise.
        state = state * _exp2(g * count.to(gl.float32))
        gl.thread_barrier()  # all have read the chunk before, and written its outputs and `held`
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        if count < CHUNK:
            _zero_chunk(a_i, b_i, c_i, count, FLAT_ROWS, FLAT)
        # Products, and other work for the time that they take.
        scores = gl.zeros([CHUNK, CHUNK], gl.float32, SCORES)
        scores = warpgroup_mma(a_i, b_i.permute((1, 0)), scores, use_acc=False, is_async=True)
        o = gl.zeros([CHUNK, COLUMNS], gl.float32, WIDE)
        o = warpgroup_mma(a_i, held, o, use_acc=False, is_async=True)
        g = gl.load(log_decay + head, volatile=True) * LOG2E  # the same number, but the compiler does not know
        if step > 0:
            free = (step - 1) % STAGES
            if BY_ROWS:
                # The outputs of the chunk before lie where its `a` was.
                x = a_ring.index(free).reshape([CHUNK, ROWS]).load(FLAT)
                _write(x, out, before, out_token, count_before, FLAT)
                gl.thread_barrier()
            token = first + (chunks - step - STAGES if REVERSE else step - 1 + STAGES) * CHUNK
            more = step - 1 + STAGES < chunks
            mbarrier.expect(ready.index(free), BYTES, pred=more)
            _fetch(a, batch32, a_head, token, ready.index(free), a_ring.index(free), more)
            _fetch(b, batch32, b_head, token, ready.index(free), b_ring.index(free), more)
            _fetch(c, batch32, c_head, token, ready.index(free), c_ring.index(free), more)
        # c, weighted by the steps from each token to the state at the chunk's end.
        token = gl.arange(0, CHUNK, gl.SliceLayout(1, FLAT))
        exponent = token + 1 if REVERSE else gl.maximum(count - 1 - token, 0)
        weight = _exp2(g * exponent.to(gl.float32)) * added_scale
        high_part, low_part = _two_parts(c_i.load(FLAT).to(gl.float32) * weight[:, None], dtype)
        high.store(high_part)
        low.store(low_part)
        from_state = _from_state(g, state_scale * unit, count, CHUNK, REVERSE, WIDE)
        scores = warpgroup_mma_wait(1, [scores])
        seen.store(_decayed(scores, g, scale, dtype, REVERSE, SCORES))
        fence_async_shared()
        o = warpgroup_mma_wait(0, [o])
        o = o * from_state
        gl.thread_barrier()  # all have read `a` and `held`, and written `seen`, `high` and `low`

        o = warpgroup_mma(seen, c_i, o, is_async=True)
        state = warpgroup_mma(b_i.permute((1, 0)), high, state, is_async=True)
        state = warpgroup_mma(b_i.permute((1, 0)), low, state, is_async=True)
        before, count_before = start + offset, count
        o = warpgroup_mma_wait(2, [o])
        if BY_ROWS:
            a_i.store(o.to(dtype))
        else:
            _write(o.to(out.dtype.element_ty), out, before, out_token, count, WIDE)
        state = warpgroup_mma_wait(0, [state])
        unit = _hold(held, state)
        fence_async_shared()

    if BY_ROWS:
        gl.thread_barrier()
        x = a_ring.index((chunks - 1) % STAGES).reshape([CHUNK, ROWS]).load(FLAT)
        _write(x, out, before, out_token, count_before, FLAT)
