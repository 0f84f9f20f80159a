"""States and outputs of a tile on Hopper (sm_90), in Gluon, with every operand of wgmma in shared memory.

For fp32, whose operands are sums of two fp16 numbers (leetdist.kernels.triton.parts), for head dimensions up to 256,
and for 16-bit inputs whose state and scores are to keep more than 16 bits. A program has a block of the state's
columns, in the accumulators of two warpgroups that share them; nothing else stays in registers for long.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from leetdist.kernels.triton.hopper_kernels import COUNTS, FP32_RANGE, LOG2E, _exp2, _span, _zero_rows

# A block's largest number is from 2^13 to 2^14 units (leetdist.kernels.triton.parts).
LARGE = gl.constexpr(8192.0)


@gluon.constexpr_function
def _accumulator(columns, num_warps):
    """Chunks have 64 rows, which is a warpgroup's least, so the warpgroups share the columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, num_warps // 4], [16, columns * 4 // num_warps, 16])


@gluon.constexpr_function
def _by_rows(columns, bits, num_warps):
    """16 bytes a thread, whole rows a warp."""
    vector = 128 // bits
    threads = min(32, columns // vector)
    return gl.BlockedLayout([1, vector], [32 // threads, threads], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def _shared(rows, columns, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@gluon.jit
def _unit(x):
    """See leetdist.kernels.triton.parts.unit."""
    largest = gl.max(gl.max(gl.abs(x), 1), 0)
    bits = gl.maximum(largest.to(gl.int32, bitcast=True) & 0x7F800000, 0x20000000)
    return bits.to(gl.float32, bitcast=True) / LARGE, (0x7F000000 - bits).to(gl.float32, bitcast=True) * LARGE


@gluon.jit
def _put(shared, x, zero):
    """Store x as the sum of as many 16-bit numbers as `shared` has room for."""
    large = x.to(shared.dtype)
    shared.index(zero).store(large)
    if shared.shape[0] == 2:
        shared.index(1 + zero).store((x - large.to(gl.float32)).to(shared.dtype))


@gluon.jit
def _get(shared, number, TRANSPOSED: gl.constexpr = False):
    x = shared.index(number)
    if len(x.shape) == 4:  # as bulk copies want it
        x = x.reshape([x.shape[2], x.shape[3]])
    if TRANSPOSED:
        x = x.permute((1, 0))
    return x


@gluon.jit
def _product(a, b, total, zero, ADD: gl.constexpr, A: gl.constexpr = False, B: gl.constexpr = False):
    """a . b (added to `total`, with ADD) of operands in parts, under way; A, B: that operand transposed."""
    A_PARTS: gl.constexpr = a.shape[0]
    B_PARTS: gl.constexpr = b.shape[0]
    if A_PARTS == 2:
        total = warpgroup_mma(_get(a, 1 + zero, A), _get(b, zero, B), total, use_acc=ADD, is_async=True)
    if B_PARTS == 2:
        add: gl.constexpr = ADD or A_PARTS == 2
        total = warpgroup_mma(_get(a, zero, A), _get(b, 1 + zero, B), total, use_acc=add, is_async=True)
    add_last: gl.constexpr = ADD or A_PARTS == 2 or B_PARTS == 2
    return warpgroup_mma(_get(a, zero, A), _get(b, zero, B), total, use_acc=add_last, is_async=True)


@gluon.jit
def _load(
    base, stride, first, count, column, columns, zero,
    CHUNK: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """(CHUNK, COLUMNS) of the rows from `first` on, zero outside."""
    i = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT)) + zero
    j = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    pointers = base + first * stride + (i[:, None] * stride + j[None, :])
    return gl.load(pointers, mask=(i < count)[:, None] & (j < columns)[None, :], other=0.0)


@gluon.jit
def _powers(g, exponent):
    return _exp2(g * gl.maximum(exponent, 0).to(gl.float32))


@gluon.jit
def _to_state(g, count, zero, CHUNK: gl.constexpr, REVERSE: gl.constexpr, LAYOUT: gl.constexpr):
    """(CHUNK, 1): gamma^(steps from each token to the state at the chunk's end)."""
    i = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT)) + zero
    return _powers(g, i + 1 if REVERSE else count - 1 - i)[:, None]


@gluon.jit
def _decays(g, zero, CHUNK: gl.constexpr, REVERSE: gl.constexpr, LAYOUT: gl.constexpr):
    """(CHUNK, CHUNK): gamma^(i-j) for the tokens j that i sees, else 0."""
    i = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))[:, None] + zero
    j = gl.arange(0, CHUNK, gl.SliceLayout(0, LAYOUT))[None, :]
    distance = j - i if REVERSE else i - j
    return gl.where(distance >= 0, _powers(g, distance), 0.0)


@gluon.jit
def _lost(g, count):
    """See leetdist.kernels.triton.parts.lost; g = log2 gamma."""
    y = g * (count.to(gl.float32) * 0.6931471805599453)
    series = 1.0 + y / 8
    for n in gl.static_range(6):
        series = 1.0 + y * series * (1.0 / (7 - n))
    return gl.where(y > -0.5, y * series, _exp2(g * count.to(gl.float32)) - 1.0)


@gluon.jit
def _reread(log_decay, head):
    """log2 gamma, and 0. The compiler knows neither, so that it computes what depends on them (decays, addresses) anew
    in each chunk. Held from one to the next, they would spill: 1,000 bytes a thread, and 40 like this."""
    g = gl.load(log_decay + head, volatile=True) * LOG2E
    return g, gl.where(g > 0, 1, 0)


@gluon.jit(do_not_specialize=COUNTS)
def tile_states_kernel(
    b, c, log_decay, out, table,
    b_batch, b_head, b_token, c_batch, c_head, c_token, heads, b_share, c_share,
    tokens, tiles, tile_size, rows, columns, scale,
    REGULAR: gl.constexpr, REVERSE: gl.constexpr, CHUNK: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    PARTS: gl.constexpr, WEIGHTED_PARTS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """b, c: pointers to fp32 (STAGES = 0), or descriptors of bulk copies of 16-bit numbers into STAGES buffers."""
    BULK: gl.constexpr = STAGES > 0
    dtype: gl.constexpr = b.dtype if BULK else gl.float16
    WIDE: gl.constexpr = _accumulator(COLUMNS, num_warps)
    LONG: gl.constexpr = _by_rows(ROWS, 16 if BULK else 32, num_warps)
    SHORT: gl.constexpr = _by_rows(COLUMNS, 16 if BULK else 32, num_warps)

    program = gl.program_id(0).to(gl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    column = gl.program_id(1) * COLUMNS
    start, length = _span(table, tile, tokens, tile_size, REGULAR)
    log_gamma = gl.load(log_decay + head)
    # Tokens so far from the state that gamma^distance is 0 in fp32 are not read: with the usual slopes, half of them.
    reach = gl.minimum(FP32_RANGE / gl.maximum(-log_gamma, 1e-9), tile_size * 1.0).to(gl.int32)
    all_chunks = gl.cdiv(length, CHUNK)
    chunks = gl.minimum(all_chunks, gl.cdiv(reach, CHUNK) + 1)
    # From the farthest chunk to the one beside the state.
    offset = (chunks - 1 if REVERSE else all_chunks - chunks) * CHUNK
    stride = -CHUNK if REVERSE else CHUNK
    count = gl.minimum(length - offset, CHUNK)

    weighted = gl.allocate_shared_memory(dtype, [WEIGHTED_PARTS, CHUNK, COLUMNS], _shared(CHUNK, COLUMNS, dtype))
    if BULK:
        BYTES: gl.constexpr = (ROWS + COLUMNS) * CHUNK * 2
        b_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, CHUNK, ROWS], b.layout)
        c_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, CHUNK, COLUMNS], c.layout)
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(STAGES):
            mbarrier.init(ready.index(s), count=1)
        fence_async_shared()
        row, origin = batch.to(gl.int32), (start + offset).to(gl.int32)
        b_head, c_head = (head // b_share).to(gl.int32), (head // c_share).to(gl.int32)
        for s in gl.static_range(STAGES):
            where, more, bar = origin + s * stride, s < chunks, ready.index(s)
            mbarrier.expect(bar, BYTES, pred=more)
            tma.async_copy_global_to_shared(b, [row, b_head, where, 0], bar, b_ring.index(s), pred=more)
            tma.async_copy_global_to_shared(c, [row, c_head, where, column], bar, c_ring.index(s), pred=more)
    else:
        b_held = gl.allocate_shared_memory(dtype, [PARTS, CHUNK, ROWS], _shared(CHUNK, ROWS, dtype))
        b += batch * b_batch + head // b_share * b_head
        c += batch * c_batch + head // c_share * c_head
        b_i = _load(b, b_token, start + offset, count, 0, rows, 0, CHUNK, ROWS, LONG)
        c_i = _load(c, c_token, start + offset, count, column, columns, 0, CHUNK, COLUMNS, SHORT)

    state = gl.zeros([ROWS, COLUMNS], gl.float32, WIDE)
    for step in range(chunks):
        g, zero = _reread(log_decay, head)
        weight = _to_state(g, count, zero, CHUNK, REVERSE, SHORT)
        state += state * _lost(g, count)
        if BULK:
            stage = step % STAGES
            bar = ready.index(stage)
            mbarrier.wait(bar, (step // STAGES) & 1)
            if count < CHUNK:
                _zero_rows(_get(b_ring, stage), count, LONG)
                _zero_rows(_get(c_ring, stage), count, SHORT)
                gl.thread_barrier()
            _put(weighted, _get(c_ring, stage).load(SHORT).to(gl.float32) * (weight * scale), zero)
        else:
            b_unit, b_inverse = _unit(b_i)
            c_unit, c_inverse = _unit(c_i)
            _put(b_held, b_i * b_inverse, zero)
            _put(weighted, c_i * (c_inverse * weight), zero)
        fence_async_shared()
        gl.thread_barrier()
        offset += stride
        count = gl.where(step + 1 < chunks, gl.minimum(length - offset, CHUNK), 0)
        if BULK:
            for small in gl.static_range(WEIGHTED_PARTS):
                part = _get(weighted, WEIGHTED_PARTS - 1 - small + zero)
                state = warpgroup_mma(_get(b_ring, stage, True), part, state, is_async=True)
            state = warpgroup_mma_wait(0, [state])
            gl.thread_barrier()  # all have read the chunk: it makes room for another
            where, more = origin + (step + STAGES) * stride, step + STAGES < chunks
            mbarrier.expect(bar, BYTES, pred=more)
            tma.async_copy_global_to_shared(b, [row, b_head, where, 0], bar, b_ring.index(stage), pred=more)
            tma.async_copy_global_to_shared(c, [row, c_head, where, column], bar, c_ring.index(stage), pred=more)
        else:
            # Apart from the state: the matrix units cut each sum off toward zero, which would add up.
            added = gl.zeros([ROWS, COLUMNS], gl.float32, WIDE)
            added = _product(b_held, weighted, added, zero, False, A=True)
            b_i = _load(b, b_token, start + offset, count, 0, rows, zero, CHUNK, ROWS, LONG)
            c_i = _load(c, c_token, start + offset, count, column, columns, zero, CHUNK, COLUMNS, SHORT)
            added = warpgroup_mma_wait(0, [added])
            state += added * (b_unit * c_unit * scale)
            gl.thread_barrier()

    i = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))[:, None]
    j = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, WIDE))[None, :]
    gl.store(out + program * rows * columns + i * columns + j, state, mask=(i < rows) & (j < columns))


@gluon.jit(do_not_specialize=COUNTS)
def tile_outputs_kernel(
    a, b, c, states, log_decay, out, table,
    a_batch, a_head, a_token, b_batch, b_head, b_token, c_batch, c_head, c_token,
    out_batch, out_head, out_token, state_batch, state_head, state_tile, state_row, state_column,
    heads, a_share, b_share, c_share, tokens, tiles, tile_size, rows, columns, scale, state_scale, added_scale,
    REGULAR: gl.constexpr, REVERSE: gl.constexpr, CHUNK: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    PARTS: gl.constexpr, STATE_PARTS: gl.constexpr, SCORE_PARTS: gl.constexpr, WEIGHTED_PARTS: gl.constexpr,
    BULK: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """a, b, c: pointers to fp32, or with BULK descriptors of bulk copies of 16-bit numbers."""
    dtype: gl.constexpr = a.dtype if BULK else gl.float16
    WIDE: gl.constexpr = _accumulator(COLUMNS, num_warps)
    SCORES: gl.constexpr = _accumulator(CHUNK, num_warps)
    LONG: gl.constexpr = _by_rows(ROWS, 16 if BULK else 32, num_warps)
    SHORT: gl.constexpr = _by_rows(COLUMNS, 16 if BULK else 32, num_warps)

    program = gl.program_id(0).to(gl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    column = gl.program_id(1) * COLUMNS
    start, length = _span(table, tile, tokens, tile_size, REGULAR)
    chunks = gl.cdiv(length, CHUNK)
    offset = (chunks - 1) * CHUNK if REVERSE else 0
    count = gl.minimum(length - offset, CHUNK)
    where = (start + offset).to(gl.int32)

    weighted = gl.allocate_shared_memory(dtype, [WEIGHTED_PARTS, CHUNK, COLUMNS], _shared(CHUNK, COLUMNS, dtype))
    seen = gl.allocate_shared_memory(dtype, [SCORE_PARTS, CHUNK, CHUNK], _shared(CHUNK, CHUNK, dtype))
    held = gl.allocate_shared_memory(dtype, [STATE_PARTS, ROWS, COLUMNS], _shared(ROWS, COLUMNS, dtype))
    if BULK:
        a_held = gl.allocate_shared_memory(dtype, [1, 1, 1, CHUNK, ROWS], a.layout)
        b_held = gl.allocate_shared_memory(dtype, [1, 1, 1, CHUNK, ROWS], b.layout)
        c_held = gl.allocate_shared_memory(dtype, [1, 1, 1, CHUNK, COLUMNS], c.layout)
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(ready, count=1)
        fence_async_shared()
        a_at = (head // a_share).to(gl.int32)
        b_at, c_at = (head // b_share).to(gl.int32), (head // c_share).to(gl.int32)
        row, more = batch.to(gl.int32), chunks > 0
        BYTES: gl.constexpr = (2 * ROWS + COLUMNS) * CHUNK * 2
        mbarrier.expect(ready, BYTES, pred=more)
        tma.async_copy_global_to_shared(a, [row, a_at, where, 0], ready, a_held.index(0), pred=more)
        tma.async_copy_global_to_shared(b, [row, b_at, where, 0], ready, b_held.index(0), pred=more)
        tma.async_copy_global_to_shared(c, [row, c_at, where, column], ready, c_held.index(0), pred=more)
    else:
        a_held = gl.allocate_shared_memory(dtype, [PARTS, CHUNK, ROWS], _shared(CHUNK, ROWS, dtype))
        b_held = gl.allocate_shared_memory(dtype, [PARTS, CHUNK, ROWS], _shared(CHUNK, ROWS, dtype))
        c_held = gl.allocate_shared_memory(dtype, [PARTS, CHUNK, COLUMNS], _shared(CHUNK, COLUMNS, dtype))
        a += batch * a_batch + head // a_share * a_head
        b += batch * b_batch + head // b_share * b_head
        c += batch * c_batch + head // c_share * c_head

    states += batch * state_batch + head * state_head + tile * state_tile
    i = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))[:, None]
    j = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, WIDE))[None, :]
    state = gl.load(states + i * state_row + j * state_column, mask=(i < rows) & (j < columns), other=0.0)
    out += batch * out_batch + head * out_head

    for step in range(chunks):
        g, zero = _reread(log_decay, head)
        lost = _lost(g, count)
        weight = _to_state(g, count, zero, CHUNK, REVERSE, SHORT)
        s_unit = 1.0
        if dtype == gl.float16:  # a state can exceed fp16's range: it grows with the sequence
            s_unit, s_inverse = _unit(state)
            _put(held, state * s_inverse, zero)
        else:
            _put(held, state, zero)
        if BULK:
            mbarrier.wait(ready, step & 1)
            if count < CHUNK:
                _zero_rows(_get(b_held, 0), count, LONG)
                _zero_rows(_get(c_held, 0), count, SHORT)
                gl.thread_barrier()
            c_i = _get(c_held, 0).load(SHORT).to(gl.float32) * added_scale
        else:
            a_i = _load(a, a_token, start + offset, count, 0, rows, zero, CHUNK, ROWS, LONG)
            b_i = _load(b, b_token, start + offset, count, 0, rows, zero, CHUNK, ROWS, LONG)
            c_i = _load(c, c_token, start + offset, count, column, columns, zero, CHUNK, COLUMNS, SHORT)
            a_unit, a_inverse = _unit(a_i)
            b_unit, b_inverse = _unit(b_i)
            c_unit, c_inverse = _unit(c_i)
            c_i = c_i * c_inverse
            _put(a_held, a_i * a_inverse, zero)
            _put(b_held, b_i * b_inverse, zero)
            _put(c_held, c_i, zero)
        _put(weighted, c_i * weight, zero)
        fence_async_shared()
        gl.thread_barrier()

        scores = gl.zeros([CHUNK, CHUNK], gl.float32, SCORES)
        scores = _product(a_held, b_held, scores, zero, False, B=True)
        far = gl.zeros([CHUNK, COLUMNS], gl.float32, WIDE)
        far = _product(a_held, held, far, zero, False)
        decay = _decays(g, zero, CHUNK, REVERSE, SCORES)
        token = gl.arange(0, CHUNK, gl.SliceLayout(1, WIDE)) + zero
        from_state = (_powers(g, count - 1 - token if REVERSE else token + 1) * (state_scale * s_unit))[:, None]
        scores, far = warpgroup_mma_wait(0, [scores, far])
        if BULK:
            _put(seen, scores * (decay * scale), zero)
            o = far * from_state
            added = state + state * lost
        else:
            # So that no score leaves fp16's range: a_held and b_held are under 2 LARGE.
            _put(seen, scores * (decay * (1.0 / (LARGE * ROWS))), zero)
            o = gl.zeros([CHUNK, COLUMNS], gl.float32, WIDE)
            added = gl.zeros([ROWS, COLUMNS], gl.float32, WIDE)
        fence_async_shared()
        gl.thread_barrier()
        before, inside = start + offset, count
        offset += -CHUNK if REVERSE else CHUNK
        count = gl.where(step + 1 < chunks, gl.minimum(length - offset, CHUNK), 0)
        if BULK:
            where, more = (start + offset).to(gl.int32), step + 1 < chunks
            mbarrier.expect(ready, BYTES, pred=more)
            tma.async_copy_global_to_shared(a, [row, a_at, where, 0], ready, a_held.index(0), pred=more)
        o = _product(seen, c_held, o, zero, BULK)
        added = _product(b_held, weighted, added, zero, BULK, A=True)
        o = warpgroup_mma_wait(PARTS + WEIGHTED_PARTS - 1, [o])
        if not BULK:
            o = far * (from_state * a_unit) + o * (a_unit * b_unit * c_unit * (scale * LARGE * ROWS))
        pointers = out + before * out_token + (token[:, None] * out_token + j)
        gl.store(pointers, o.to(out.dtype.element_ty), mask=(token < inside)[:, None] & (j < columns))
        added = warpgroup_mma_wait(0, [added])
        if BULK:
            state = added
        else:
            state = (state + state * lost) + added * (b_unit * c_unit * added_scale)
        gl.thread_barrier()  # all have read the chunk
        if BULK:
            tma.async_copy_global_to_shared(b, [row, b_at, where, 0], ready, b_held.index(0), pred=more)
            tma.async_copy_global_to_shared(c, [row, c_at, where, column], ready, c_held.index(0), pred=more)
