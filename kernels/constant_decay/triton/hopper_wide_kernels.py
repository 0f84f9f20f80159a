"""States and outputs of a tile on Hopper (sm_90), in Gluon, with every operand of wgmma in shared memory.

For fp32, whose operands are sums of two fp16 numbers (constant_decay.triton.parts), for head dimensions up to 256,
and for 16-bit inputs whose state and scores are to keep more than 16 bits. A program has a block of the state's
columns, in the accumulators of two warpgroups that share them; nothing else stays in registers for long.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from leetdist.kernels.constant_decay.triton.hopper_kernels import COUNTS, FP32_RANGE, span, zero_rows
from leetdist.kernels.constant_decay.triton.hopper_lost import clean, lost_before, mark, not_finite, say
from leetdist.kernels.constant_decay.triton.hopper_parts import (
    LARGE,
    SMALLEST,
    accumulator,
    by_rows,
    fetch,
    hold,
    lost_across,
    matrix,
    powers,
    product,
    put,
    reread,
    seen_from,
    shared_layout,
    to_state,
    unit_of_block,
    units_of_rows,
)
from leetdist.kernels.runtime.gluon import barrier, reinterpret


@gluon.jit
def _place(columns, COLUMNS: gl.constexpr):
    """A program's number, head by head, and its first column. A tile's are neighbours: L2 has what they share."""
    blocks = gl.cdiv(columns, COLUMNS)
    return (gl.program_id(0) // blocks).to(gl.int64), gl.program_id(0) % blocks * COLUMNS


@gluon.jit
def _raw(shared, desc, CHUNK: gl.constexpr):
    """Where a bulk copy puts a chunk: at the beginning of `shared`, (rows, columns)."""
    if shared.dtype == desc.dtype and shared.shape[0] == 2 * CHUNK:  # of which it takes half
        shared = reinterpret(shared, shared.dtype, [2, CHUNK, shared.shape[1]], shared.layout).index(0)
    return reinterpret(shared, desc.dtype, [1, 1, CHUNK, shared.shape[1]], desc.layout)


@gluon.jit
def _weigh(
    b_shared, c_shared, b, c, g, count, scale, zero,
    PARTS: gl.constexpr, WEIGHTED_PARTS: gl.constexpr, REVERSE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """b and c as they came become parts of b and of c weighted, where they lie; returns the unit of their product."""
    UNITS: gl.constexpr = b.dtype == gl.float32
    CHUNK: gl.constexpr = c_shared.shape[0] // 2
    BITS: gl.constexpr = b.dtype.primitive_bitwidth
    LONG: gl.constexpr = by_rows(b_shared.shape[1], BITS, num_warps)
    SHORT: gl.constexpr = by_rows(c_shared.shape[1], BITS, num_warps)
    b_i, c_i = matrix(_raw(b_shared, b, CHUNK)), matrix(_raw(c_shared, c, CHUNK))
    weighted = reinterpret(c_shared, c_shared.dtype, [2, CHUNK, c_shared.shape[1]], c_shared.layout)
    if count < CHUNK:
        zero_rows(b_i, count, LONG)
        zero_rows(c_i, count, SHORT)
        barrier()
    c_values = c_i.load(SHORT).to(gl.float32) * to_state(g, count, zero, CHUNK, REVERSE, SHORT)
    if UNITS:
        b_values = b_i.load(LONG)
        b_unit, b_inverse = unit_of_block(b_values)
        c_unit, c_inverse = unit_of_block(c_values)
        barrier()  # all have read what the parts take the place of
        b_held = reinterpret(b_shared, b_shared.dtype, [2, CHUNK, b_shared.shape[1]], b_shared.layout)
        put(b_held, b_values * b_inverse, PARTS, zero)
        put(weighted, c_values * c_inverse, WEIGHTED_PARTS, zero)
        unit = b_unit * c_unit * scale
    else:
        barrier()
        put(weighted, c_values * scale, WEIGHTED_PARTS, zero)
        unit = scale
    return unit


@gluon.jit(do_not_specialize=COUNTS)
def tile_states_kernel(
    b, c, log_decay, out, table, heads, b_share, c_share, tokens, tiles, tile_size, unread, rows, columns, out_tile,
    scale,
    REGULAR: gl.constexpr, REVERSE: gl.constexpr, CHUNK: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    PARTS: gl.constexpr, WEIGHTED_PARTS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    UNITS: gl.constexpr = b.dtype == gl.float32
    dtype: gl.constexpr = gl.float16 if UNITS else b.dtype
    STATE: gl.constexpr = accumulator(ROWS, COLUMNS, num_warps)

    program, column = _place(columns, COLUMNS)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    log_gamma = gl.load(log_decay + head)
    # Tokens so far from the state that gamma^distance is 0 in fp32 are not read: with the usual slopes, half of them.
    reach = gl.minimum(FP32_RANGE / gl.maximum(-log_gamma, 1e-9), tile_size * 1.0).to(gl.int32)
    all_chunks = gl.cdiv(length, CHUNK)
    chunks = gl.where(tile == unread, 0, gl.minimum(all_chunks, gl.cdiv(reach, CHUNK) + 1))
    # From the farthest chunk to the one beside the state.
    offset = (chunks - 1 if REVERSE else all_chunks - chunks) * CHUNK
    stride = -CHUNK if REVERSE else CHUNK

    # Bulk copies put b and c where their parts, and c's weighted, are going to be.
    SIZE: gl.constexpr = 2 if UNITS else 1
    B_SHARED: gl.constexpr = shared_layout(CHUNK, ROWS, dtype)
    C_SHARED: gl.constexpr = shared_layout(CHUNK, COLUMNS, dtype)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, SIZE * CHUNK, ROWS], B_SHARED)
    c_ring = gl.allocate_shared_memory(dtype, [STAGES, 2 * CHUNK, COLUMNS], C_SHARED)
    BYTES: gl.constexpr = (ROWS + COLUMNS) * CHUNK * b.dtype.primitive_bitwidth // 8
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    row, origin = batch.to(gl.int32), (start + offset).to(gl.int32)
    b_head, c_head = (head // b_share).to(gl.int32), (head // c_share).to(gl.int32)
    for s in gl.static_range(STAGES):
        where, more, bar = origin + s * stride, s < chunks, ready.index(s)
        mbarrier.expect(bar, BYTES, pred=more)
        fetch(b, row, b_head, where, 0, bar, _raw(b_ring.index(s), b, CHUNK), more)
        fetch(c, row, c_head, where, column, bar, _raw(c_ring.index(s), c, CHUNK), more)

    state = gl.zeros([ROWS, COLUMNS], gl.float32, STATE)
    g, zero = reread(log_decay, head)
    count = gl.minimum(length - offset, CHUNK)
    mbarrier.wait(ready.index(0), 0, pred=chunks > 0)
    unit = _weigh(
        b_ring.index(0), c_ring.index(0), b, c, g, count, scale, zero, PARTS, WEIGHTED_PARTS, REVERSE, num_warps
    )
    fence_async_shared()
    barrier()
    for step in range(chunks):
        stage, following = step % STAGES, (step + 1) % STAGES
        b_held = reinterpret(b_ring.index(stage), dtype, [SIZE, CHUNK, ROWS], B_SHARED)
        weighted = reinterpret(c_ring.index(stage), dtype, [2, CHUNK, COLUMNS], C_SHARED)
        if UNITS:
            # Apart from the state: the matrix units cut each sum off toward zero, which would add up.
            added = gl.zeros([ROWS, COLUMNS], gl.float32, STATE)
        else:
            added = state
        added = product(b_held, PARTS, weighted, WEIGHTED_PARTS, added, zero, not UNITS, A=True)
        # Meanwhile, the next chunk (or, after the last, what is left of another).
        more = step + 1 < chunks
        g, zero = reread(log_decay, head)
        offset += stride
        count = gl.where(more, gl.minimum(length - offset, CHUNK), CHUNK)
        lost = gl.where(more, lost_across(g, count), 0.0)
        mbarrier.wait(ready.index(following), ((step + 1) // STAGES) & 1, pred=more)
        next_unit = _weigh(
            b_ring.index(following), c_ring.index(following), b, c, g, count, scale, zero,
            PARTS, WEIGHTED_PARTS, REVERSE, num_warps,
        )  # fmt: skip
        fence_async_shared()
        added = warpgroup_mma_wait(0, [added])
        if UNITS:
            state += added * unit
        else:
            state = added
        state += state * lost
        unit = next_unit
        barrier()  # all have read this chunk and written the next
        where, more, bar = origin + (step + STAGES) * stride, step + STAGES < chunks, ready.index(stage)
        mbarrier.expect(bar, BYTES, pred=more)
        fetch(b, row, b_head, where, 0, bar, _raw(b_ring.index(stage), b, CHUNK), more)
        fetch(c, row, c_head, where, column, bar, _raw(c_ring.index(stage), c, CHUNK), more)

    i = gl.arange(0, ROWS, gl.SliceLayout(1, STATE))[:, None]
    j = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, STATE))[None, :]
    gl.store(out + program * out_tile + i * columns + j, state, mask=(i < rows) & (j < columns))


@gluon.jit(do_not_specialize=COUNTS)
def tile_outputs_kernel(
    a, b, c, states, log_decay, out, again, table, onto,
    out_batch, out_head, out_token, onto_batch, onto_head, onto_token,
    state_batch, state_head, state_tile, state_row, state_column,
    heads, a_share, b_share, c_share, tokens, tiles, tile_size, rows, columns, scale, state_scale, added_scale,
    REGULAR: gl.constexpr, REVERSE: gl.constexpr, CHUNK: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    PARTS: gl.constexpr, STATE_PARTS: gl.constexpr, SCORE_PARTS: gl.constexpr, WEIGHTED_PARTS: gl.constexpr,
    AGAIN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    UNITS: gl.constexpr = a.dtype == gl.float32
    dtype: gl.constexpr = gl.float16 if UNITS else a.dtype
    WIDE: gl.constexpr = accumulator(CHUNK, COLUMNS, num_warps)
    SCORES: gl.constexpr = accumulator(CHUNK, CHUNK, num_warps)
    STATE: gl.constexpr = accumulator(ROWS, COLUMNS, num_warps)
    LONG: gl.constexpr = by_rows(ROWS, a.dtype.primitive_bitwidth, num_warps)
    SHORT: gl.constexpr = by_rows(COLUMNS, a.dtype.primitive_bitwidth, num_warps)
    # Bulk copies put fp32 numbers where their two parts are going to be.
    SIZE: gl.constexpr = 2 if UNITS else 1

    again += gl.program_id(0)
    if AGAIN:
        if gl.load(again) == 0:
            return
    program, column = _place(columns, COLUMNS)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    chunks = gl.cdiv(length, CHUNK)
    offset = (chunks - 1) * CHUNK if REVERSE else 0

    a_held = gl.allocate_shared_memory(dtype, [SIZE, CHUNK, ROWS], shared_layout(CHUNK, ROWS, dtype))
    b_held = gl.allocate_shared_memory(dtype, [SIZE, CHUNK, ROWS], shared_layout(CHUNK, ROWS, dtype))
    C_SHARED: gl.constexpr = shared_layout(CHUNK, COLUMNS, dtype)
    c_ring = gl.allocate_shared_memory(dtype, [2, SIZE * CHUNK, COLUMNS], C_SHARED)
    seen = gl.allocate_shared_memory(dtype, [SCORE_PARTS, CHUNK, CHUNK], shared_layout(CHUNK, CHUNK, dtype))
    held = gl.allocate_shared_memory(dtype, [STATE_PARTS, ROWS, COLUMNS], shared_layout(ROWS, COLUMNS, dtype))
    if UNITS:
        units = gl.allocate_shared_memory(gl.float32, [2, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        weighted = gl.allocate_shared_memory(dtype, [WEIGHTED_PARTS, CHUNK, COLUMNS], C_SHARED)
    a_raw = reinterpret(a_held, a.dtype, [1, 1, CHUNK, ROWS], a.layout)
    b_raw = reinterpret(b_held, a.dtype, [1, 1, CHUNK, ROWS], b.layout)
    A_BYTES: gl.constexpr = ROWS * CHUNK * a.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = (ROWS + COLUMNS) * CHUNK * a.dtype.primitive_bitwidth // 8
    a_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(a_ready, count=1)
    mbarrier.init(ready, count=1)
    fence_async_shared()
    row, where, more = batch.to(gl.int32), (start + offset).to(gl.int32), chunks > 0
    a_head = (head // a_share).to(gl.int32)
    b_head, c_head = (head // b_share).to(gl.int32), (head // c_share).to(gl.int32)
    mbarrier.expect(a_ready, A_BYTES, pred=more)
    fetch(a, row, a_head, where, 0, a_ready, a_raw, more)
    mbarrier.expect(ready, BYTES, pred=more)
    fetch(b, row, b_head, where, 0, ready, b_raw, more)
    c_raw = reinterpret(c_ring.index(0), a.dtype, [1, 1, CHUNK, COLUMNS], c.layout)
    fetch(c, row, c_head, where, column, ready, c_raw, more)

    states += batch * state_batch + head * state_head + tile * state_tile
    i = gl.arange(0, ROWS, gl.SliceLayout(1, STATE))[:, None]
    k = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, STATE))[None, :]
    state = gl.load(states + i * state_row + k * state_column, mask=(i < rows) & (k < columns), other=0.0)
    if AGAIN:
        lost_from = lost_before(
            states, state_row, state_column, rows, columns, column, CHUNK, [ROWS, COLUMNS], WIDE, num_warps
        )  # fmt: skip
        state = gl.where(not_finite(state), 0.0, state)
    unit = hold(held, state, STATE_PARTS, 0)
    out += batch * out_batch + head * out_head
    if onto is not None:
        onto += batch * onto_batch + head * onto_head

    for step in range(chunks):
        g, zero = reread(log_decay, head)
        c_held = reinterpret(c_ring.index(step % 2 + zero), dtype, [SIZE, CHUNK, COLUMNS], C_SHARED)
        if UNITS:
            weighted = reinterpret(c_ring.index((step + 1) % 2 + zero), dtype, [SIZE, CHUNK, COLUMNS], C_SHARED)
        count = gl.minimum(length - offset, CHUNK)
        weight = to_state(g, count, zero, CHUNK, REVERSE, SHORT)
        lost = lost_across(g, count)
        state += state * lost
        mbarrier.wait(a_ready, step & 1)
        a_i = matrix(a_raw)
        if count < CHUNK:
            zero_rows(a_i, count, LONG)
            barrier()
        if UNITS:
            a_values = a_i.load(LONG)
            a_unit, a_inverse = units_of_rows(a_values, LONG)
            barrier()  # all have read what the parts take the place of
            units.index(0).store(a_unit)
            put(a_held, a_values * a_inverse[:, None], PARTS, zero)
            fence_async_shared()
            barrier()
            # Under way while b's parts are made, as the scores are while c's are. With 256 rows it would spill.
            o = gl.zeros([CHUNK, COLUMNS], gl.float32, WIDE)
            o = product(a_held, PARTS, held, STATE_PARTS, o, zero, False)

        mbarrier.wait(ready, step & 1)
        b_i, c_i = matrix(b_raw), matrix(reinterpret(c_held, a.dtype, [1, 1, CHUNK, COLUMNS], c.layout))
        if count < CHUNK:
            zero_rows(b_i, count, LONG)
            zero_rows(c_i, count, SHORT)
            barrier()
        if AGAIN:
            lost_from = clean(b_i, c_i, lost_from, REVERSE, LONG, WIDE, num_warps)
            barrier()
        c_values = c_i.load(SHORT).to(gl.float32)
        if UNITS:
            b_values = b_i.load(LONG)
            b_unit, b_inverse = units_of_rows(b_values, LONG)
            barrier()
            put(b_held, b_values * b_inverse[:, None], PARTS, zero)
        else:
            put(weighted, c_values * (weight * added_scale), WEIGHTED_PARTS, zero)
        fence_async_shared()
        barrier()
        if not UNITS:
            o = gl.zeros([CHUNK, COLUMNS], gl.float32, WIDE)
            o = product(a_held, PARTS, held, STATE_PARTS, o, zero, False)
        scores = gl.zeros([CHUNK, CHUNK], gl.float32, SCORES)
        scores = product(a_held, PARTS, b_held, PARTS, scores, zero, False, B=True)
        if UNITS:
            c_unit, c_inverse = units_of_rows(c_values, SHORT)
            bc_unit = gl.convert_layout(b_unit, gl.SliceLayout(1, SHORT)) * c_unit
            added_unit = gl.maximum(gl.max(bc_unit, 0), SMALLEST)
            units.index(1).store(bc_unit)
            c_values *= c_inverse[:, None]
            weight *= (bc_unit / added_unit)[:, None]
            put(c_held, c_values, PARTS, zero)
            put(weighted, c_values * weight, WEIGHTED_PARTS, zero)
            fence_async_shared()
            barrier()
            # Apart from the state: the matrix units cut each sum off toward zero, which would add up.
            added = gl.zeros([ROWS, COLUMNS], gl.float32, STATE)
        else:
            added = state
        added = product(b_held, PARTS, weighted, WEIGHTED_PARTS, added, zero, not UNITS, A=True)
        distance = seen_from(zero, CHUNK, REVERSE, SCORES)
        decay = gl.where(distance >= 0, powers(g, distance), 0.0) * scale
        token = gl.arange(0, CHUNK, gl.SliceLayout(1, WIDE)) + zero
        from_state = powers(g, count - 1 - token if REVERSE else token + 1) * (state_scale * unit)
        if UNITS:
            # The largest that a token sees; and a score in such units is below 4 LARGE^2 ROWS.
            bc_unit = units.index(1).load(gl.SliceLayout(0, SCORES))[None, :]
            largest = gl.max(gl.where(distance >= 0, bc_unit, SMALLEST), 1)
            decay *= bc_unit / largest[:, None] * (1.0 / (LARGE * ROWS))
            a_unit = units.index(0).load(gl.SliceLayout(1, WIDE))
            near_unit = a_unit * gl.convert_layout(largest, gl.SliceLayout(1, WIDE)) * (LARGE * ROWS)
            from_state *= a_unit
        scores = warpgroup_mma_wait(PARTS + WEIGHTED_PARTS - 1, [scores])
        put(seen, scores * decay, SCORE_PARTS, zero)
        fence_async_shared()
        if UNITS:
            o = warpgroup_mma_wait(PARTS + WEIGHTED_PARTS - 1, [o])
        else:  # so that less is held at a time
            o, added = warpgroup_mma_wait(0, [o, added])
        barrier()  # all have read a, and written `seen`

        before, inside = start + offset, count
        offset += -CHUNK if REVERSE else CHUNK
        where, more = (start + offset).to(gl.int32), step + 1 < chunks
        mbarrier.expect(a_ready, A_BYTES, pred=more)
        fetch(a, row, a_head, where, 0, a_ready, a_raw, more)
        if UNITS:
            near = gl.zeros([CHUNK, COLUMNS], gl.float32, WIDE)
            near = product(seen, SCORE_PARTS, c_held, PARTS, near, zero, False)
            o = o * from_state[:, None]
            added = warpgroup_mma_wait(SCORE_PARTS + PARTS - 1, [added])
            barrier()  # all have read b, and c weighted
        mbarrier.expect(ready, BYTES, pred=more)
        fetch(b, row, b_head, where, 0, ready, b_raw, more)
        c_raw = reinterpret(c_ring.index((step + 1) % 2 + zero), a.dtype, [1, 1, CHUNK, COLUMNS], c.layout)
        fetch(c, row, c_head, where, column, ready, c_raw, more)
        if UNITS:
            state += added * (added_unit * added_scale)
        else:
            near = product(seen, SCORE_PARTS, c_held, PARTS, o * from_state[:, None], zero, True)
            state = added
        unit = hold(held, state, STATE_PARTS, zero)
        near = warpgroup_mma_wait(0, [near])
        if UNITS:
            near = o + near * near_unit[:, None]
        if AGAIN:
            near, lost_from = mark(near, lost_from, REVERSE, WIDE)
        j = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, WIDE))[None, :]
        here = (token < inside)[:, None] & (j < columns)
        if onto is not None:
            near += gl.load(onto + before * onto_token + (token[:, None] * onto_token + j), mask=here, other=0.0)
        pointers = out + before * out_token + (token[:, None] * out_token + j)
        gl.store(pointers, near.to(out.dtype.element_ty), mask=here)
    if not AGAIN:
        say(again, state)
