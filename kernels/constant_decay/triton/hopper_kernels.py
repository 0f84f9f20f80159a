"""States and outputs of a tile on Hopper (sm_90), in Gluon: asynchronous wgmma and bulk copies, scheduled by hand."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from leetdist.kernels.constant_decay.pytorch import walk
from leetdist.kernels.constant_decay.triton.hopper_lost import clean, lost_before, mark, not_finite, say
from leetdist.kernels.runtime.gluon import async_load, barrier

LOG2E = gl.constexpr(1.4426950408889634)
LEAST = gl.constexpr(walk.LEAST)
# exp(-x) is 0 in fp32 for x from here on.
FP32_RANGE = gl.constexpr(104.0)
COUNTS = ["tokens", "tiles", "tile_size"]


@gluon.jit
def exp2(x):
    """2^x; below 2^-126, zero."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def bounded(log_decay):
    """A log-decay: -inf means the same as LEAST, but gamma^0 would be NaN. NaN stays."""
    return gl.where(log_decay < LEAST, LEAST, log_decay)


@gluon.jit
def span(table, tile, tokens, tile_size, REGULAR: gl.constexpr):
    """First token and number of tokens of a tile."""
    if REGULAR:
        start = tile * tile_size
        length = gl.minimum(tokens - start, tile_size)
    else:
        start = gl.load(table + 2 * tile)
        length = gl.load(table + 2 * tile + 1)
    return start, length.to(gl.int32)


@gluon.jit
def _hold(held, state):
    """Store the state as an operand, and return the factor to multiply what is read by.

    A state grows with the sequence and can exceed fp16's range, so fp16 holds it times a power of two, which is exact.
    """
    if held.dtype == gl.float16:
        largest = gl.max(gl.max(gl.abs(state), 1), 0)
        # The power of two below it, but so large that its inverse is finite; and the inverse.
        power = gl.maximum(largest.to(gl.int32, bitcast=True) & 0x7F800000, 0x10000000)
        inverse = (0x7F000000 - power).to(gl.float32, bitcast=True)
        held.store((state * (inverse * 16384.0)).to(gl.float16))
        unit = power.to(gl.float32, bitcast=True) / 16384.0
    else:
        held.store(state.to(held.dtype))
        unit = 1.0
    return unit


@gluon.jit
def _fetch(desc, batch, head, token, ready, shared, more):
    async_load(desc, [batch, head, token, 0], ready, shared, pred=more)


@gluon.jit
def zero_rows(shared, count, layout: gl.constexpr):
    """Zero the rows from `count` on: they are another document's, or nobody's."""
    x = shared.load(layout)
    row = gl.arange(0, shared.shape[0], gl.SliceLayout(1, layout))
    shared.store(gl.where((row < count)[:, None], x, gl.zeros_like(x)))


@gluon.jit
def _zero_chunk(a, b, c, count, layout: gl.constexpr):
    zero_rows(a, count, layout)
    zero_rows(b, count, layout)
    zero_rows(c, count, layout)
    fence_async_shared()
    barrier()


@gluon.constexpr_function
def _apart(length, num_warps):
    """Eights, pairs and single ones of `length` numbers, as wgmma lays out columns."""
    same, eights = [0, 0, 0], [[1 << n, 0, 0] for n in range(length.bit_length() - 4)]
    lanes, warps = [[0, 1, 0], [0, 2, 0], same, same, same], [same] * (num_warps.bit_length() - 1)
    return gl.DistributedLinearLayout([[0, 0, 1], *eights], lanes, warps, [], [length // 8, 4, 2])


@gluon.jit
def _counted(first, LENGTH: gl.constexpr, COLUMNS: gl.constexpr, num_warps: gl.constexpr):
    """`first` and on, as columns of wgmma: one number a thread, and constants. (Of gl.arange the compiler makes as many
    numbers as a thread has columns, and keeps them all from chunk to chunk.)"""
    APART: gl.constexpr = _apart(LENGTH, num_warps)
    eights = gl.arange(0, LENGTH // 8, gl.SliceLayout(1, gl.SliceLayout(2, APART)))[:, None, None] * 8
    pairs = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, APART)))[None, :, None] * 2 + first
    ones = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, APART)))[None, None, :]
    return gl.convert_layout((eights + pairs + ones).reshape([LENGTH]), COLUMNS, assert_trivial=True)


@gluon.jit
def _decayed(
    scores, g, scale, dtype: gl.constexpr, REVERSE: gl.constexpr, SCORES: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """scale gamma^(i-j) scores_ij for the tokens j that i sees, else 0."""
    CHUNK: gl.constexpr = scores.shape[0]
    # The decays are computed anew in each chunk: held, they would cost 64 registers. (`zero` is 0, as g is
    # never above 0, but the compiler does not know.) 2^23 and an integer are a float: cheaper than a conversion.
    zero = gl.where(g > 0, 1, 0)
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, SCORES))[:, None] + zero
    column = _counted(zero, CHUNK, gl.SliceLayout(0, SCORES), num_warps)[None, :]
    distance = column - row if REVERSE else row - column
    shifted = (distance + 0x4B000000).to(gl.float32, bitcast=True)
    decay = gl.where(distance >= 0, exp2(gl.fma(shifted, g + gl.zeros_like(shifted), g * -8388608.0)), 0.0)
    return (scores * decay * scale).to(dtype)


@gluon.jit
def _two_parts(x, dtype: gl.constexpr):
    """x as a sum of two numbers of `dtype`: one rounding of weighted tokens costs as much as one of the output."""
    if dtype == gl.bfloat16:
        # The upper half of an fp32 number is a bf16 number: cheaper than to round it and convert it back.
        high = (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
    else:
        high = x.to(dtype).to(gl.float32)
    return high.to(dtype), (x - high).to(dtype)


@gluon.jit
def _weighted(b, g, exponent, scale, LEFT: gl.constexpr):
    """b^T, each token times scale gamma^exponent, in two parts."""
    weight = exp2(g * exponent.to(gl.float32)) * scale
    return _two_parts(b.permute((1, 0)).load(LEFT).to(gl.float32) * weight[None, :], b.dtype)


@gluon.jit
def _add_weighted(
    state, b, c, g, count, scale, PART: gl.constexpr, REVERSE: gl.constexpr, LEFT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Start state += (b weighted)^T c. Also returns operands, which have to stay in their registers until it is done.

    They are made PART tokens at a time, for fewer registers; the order of the sum is the same.
    """
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LEFT)
    highs, lows = (), ()
    for n in gl.static_range(b.shape[0] // PART):
        if PART < 64:
            token = _counted(gl.where(g > 0, 1, 0) + n * PART, PART, COLUMNS, num_warps)
        else:
            token = gl.arange(0, PART, COLUMNS) + n * PART
        exponent = token + 1 if REVERSE else gl.maximum(count - 1 - token, 0)
        high, low = _weighted(b.slice(n * PART, PART, dim=0), g, exponent, scale, LEFT)
        state = warpgroup_mma(high, c.slice(n * PART, PART, dim=0), state, is_async=True)
        highs, lows = highs + (high,), lows + (low,)  # type: ignore[assignment]
    for n in gl.static_range(b.shape[0] // PART):
        state = warpgroup_mma(lows[n], c.slice(n * PART, PART, dim=0), state, is_async=True)
    return state, highs + lows


@gluon.jit
def _from_state(g, state_scale, count, CHUNK: gl.constexpr, REVERSE: gl.constexpr, WIDE: gl.constexpr):
    """(CHUNK, 1): state_scale gamma^(steps from the state at the chunk's start to each token)."""
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, WIDE))
    exponent = gl.maximum(count - 1 - token, 0) if REVERSE else token + 1
    return (exp2(g * exponent.to(gl.float32)) * state_scale)[:, None]


@gluon.jit
def _write(x, out, first, stride, count, LAYOUT: gl.constexpr):
    row = gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    pointers = out + (first + row)[:, None] * stride + column[None, :]
    gl.store(pointers, x, mask=(row < count)[:, None])


@gluon.jit(do_not_specialize=COUNTS)
def tile_states_kernel(
    b, c, log_decay, out, table, heads, b_share, c_share, tokens, tiles, tile_size, unread, scale,
    REGULAR: gl.constexpr, REVERSE: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One warpgroup sums a tile's state, in parts of 64 rows."""
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, COLUMNS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    BYTES: gl.constexpr = (ROWS + COLUMNS) * CHUNK * 2
    TWO: gl.constexpr = ROWS == 128

    program = gl.program_id(0).to(gl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, (program // tiles // heads).to(gl.int32)
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    b_head, c_head = (head // b_share).to(gl.int32), (head // c_share).to(gl.int32)
    log_gamma = bounded(gl.load(log_decay + head))
    # Tokens so far from the state that gamma^distance is 0 in fp32 are not read: with the usual slopes, half of them.
    reach = gl.minimum(FP32_RANGE / gl.maximum(-log_gamma, 1e-9), tile_size * 1.0).to(gl.int32)
    all_chunks = gl.cdiv(length, CHUNK)
    chunks = gl.where(tile == unread, 0, gl.minimum(all_chunks, gl.cdiv(reach, CHUNK) + 1))
    # From the farthest chunk to the one beside the state.
    origin = start.to(gl.int32) + (chunks - 1 if REVERSE else all_chunks - chunks) * CHUNK
    stride = -CHUNK if REVERSE else CHUNK

    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 1, 1, CHUNK, ROWS], b.layout)
    c_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 1, 1, CHUNK, COLUMNS], c.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    for s in gl.static_range(STAGES):
        mbarrier.expect(ready.index(s), BYTES, pred=s < chunks)
        _fetch(b, batch, b_head, origin + s * stride, ready.index(s), b_ring.index(s), s < chunks)
        _fetch(c, batch, c_head, origin + s * stride, ready.index(s), c_ring.index(s), s < chunks)

    g = log_gamma * LOG2E
    offset = origin - start.to(gl.int32)
    state_0 = gl.zeros([64, COLUMNS], gl.float32, STATE)
    if TWO:
        state_1 = gl.zeros([64, COLUMNS], gl.float32, STATE)
    for step in range(chunks):
        stage = step % STAGES
        b_i, c_i = b_ring.index(stage).reshape([CHUNK, ROWS]), c_ring.index(stage).reshape([CHUNK, COLUMNS])
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        if length - offset < CHUNK:
            zero_rows(b_i, length - offset, FLAT)
            zero_rows(c_i, length - offset, FLAT)
            fence_async_shared()
            barrier()
        token = offset + gl.arange(0, CHUNK, gl.SliceLayout(0, LEFT))
        exponent = token + 1 if REVERSE else gl.maximum(length - 1 - token, 0)
        high_0, low_0 = _weighted(b_i.slice(0, 64, dim=1), g, exponent, scale, LEFT)
        state_0 = warpgroup_mma(high_0, c_i, state_0, is_async=True)
        state_0 = warpgroup_mma(low_0, c_i, state_0, is_async=True)
        # Operands pass through the wait, so that their registers are not used again before it.
        if TWO:
            high_1, low_1 = _weighted(b_i.slice(64, 64, dim=1), g, exponent, scale, LEFT)
            state_1 = warpgroup_mma(high_1, c_i, state_1, is_async=True)
            state_1 = warpgroup_mma(low_1, c_i, state_1, is_async=True)
            state_0, high_0, low_0, state_1, high_1, low_1 = warpgroup_mma_wait(
                0, [state_0, high_0, low_0, state_1, high_1, low_1]
            )
        else:
            state_0, high_0, low_0 = warpgroup_mma_wait(0, [state_0, high_0, low_0])
        offset += stride
        barrier()  # all have read the chunk: it makes room for another
        where, more = origin + (step + STAGES) * stride, step + STAGES < chunks
        mbarrier.expect(ready.index(stage), BYTES, pred=more)
        _fetch(b, batch, b_head, where, ready.index(stage), b_ring.index(stage), more)
        _fetch(c, batch, c_head, where, ready.index(stage), c_ring.index(stage), more)

    i = gl.arange(0, 64, gl.SliceLayout(1, STATE))[:, None]
    j = gl.arange(0, COLUMNS, gl.SliceLayout(0, STATE))[None, :]
    out += program * (ROWS * COLUMNS)
    gl.store(out + i * COLUMNS + j, state_0)
    if TWO:
        gl.store(out + (64 + i) * COLUMNS + j, state_1)


@gluon.jit(do_not_specialize=COUNTS)
def tile_outputs_kernel(
    a, b, c, states, log_decay, out, again, table,
    out_batch, out_head, out_token, state_batch, state_head, state_tile, state_row, state_column,
    heads, a_share, b_share, c_share, tokens, tiles, tile_size, scale, state_scale, added_scale,
    REGULAR: gl.constexpr, REVERSE: gl.constexpr, CHUNK: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr, AGAIN: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, COLUMNS, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, CHUNK, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [num_warps, 1], [1, 0])
    dtype: gl.constexpr = a.dtype
    # Products under way behind the scores', or as many as a wait can leave.
    LATER: gl.constexpr = 2 * CHUNK // PART if CHUNK < 4 * PART else 7
    BY_ROWS: gl.constexpr = out.dtype.element_ty == dtype and ROWS == COLUMNS

    program = gl.program_id(0).to(gl.int64)
    again += program
    if AGAIN:
        if gl.load(again) == 0:
            return
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
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

    g = bounded(gl.load(log_decay + head)) * LOG2E
    states += batch * state_batch + head * state_head + tile * state_tile
    i = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))[:, None]
    j = gl.arange(0, COLUMNS, gl.SliceLayout(0, WIDE))[None, :]
    state = gl.load(states + i * state_row + j * state_column)
    if AGAIN:
        lost_from = lost_before(
            states, state_row, state_column, ROWS, COLUMNS, 0, CHUNK, [ROWS, COLUMNS], WIDE, num_warps
        )  # fmt: skip
        state = gl.where(not_finite(state), 0.0, state)
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
        state = state * exp2(g * count.to(gl.float32))
        barrier()  # all have read the chunk before, and written its outputs and `held`
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        if count < CHUNK:
            _zero_chunk(a_i, b_i, c_i, count, FLAT)
        if AGAIN:
            lost_from = clean(b_i, c_i, lost_from, REVERSE, FLAT, WIDE, num_warps)
            fence_async_shared()
            barrier()
        # The products of a chunk, with other work for the time that they take. First the scores:
        scores = gl.zeros([CHUNK, CHUNK], gl.float32, SCORES)
        scores = warpgroup_mma(a_i, b_i.permute((1, 0)), scores, use_acc=False, is_async=True)
        # The same number, but the compiler does not know.
        g = bounded(gl.load(log_decay + head, volatile=True)) * LOG2E
        if step > 0:
            free = (step - 1) % STAGES
            if BY_ROWS:
                # The outputs of the chunk before lie where its `a` was.
                x = a_ring.index(free).reshape([CHUNK, ROWS]).load(STORE)
                _write(x, out, before, out_token, count_before, STORE)
                barrier()
            token = first + (chunks - step - STAGES if REVERSE else step - 1 + STAGES) * CHUNK
            more = step - 1 + STAGES < chunks
            mbarrier.expect(ready.index(free), BYTES, pred=more)
            _fetch(a, batch32, a_head, token, ready.index(free), a_ring.index(free), more)
            _fetch(b, batch32, b_head, token, ready.index(free), b_ring.index(free), more)
            _fetch(c, batch32, c_head, token, ready.index(free), c_ring.index(free), more)
        state, weighted = _add_weighted(state, b_i, c_i, g, count, added_scale, PART, REVERSE, LEFT, num_warps)

        scores = warpgroup_mma_wait(LATER, [scores])
        seen = gl.convert_layout(_decayed(scores, g, scale, dtype, REVERSE, SCORES, num_warps), LEFT)
        # Operands pass through the wait, so that their registers are not used again before it.
        state = warpgroup_mma_wait(0, (state,) + weighted)[0]
        o = gl.zeros([CHUNK, COLUMNS], gl.float32, WIDE)
        o = warpgroup_mma(a_i, held, o, use_acc=False, is_async=True)
        from_state = _from_state(g, state_scale * unit, count, CHUNK, REVERSE, WIDE)
        o = warpgroup_mma_wait(0, [o])
        o = o * from_state
        o = warpgroup_mma(seen, c_i, o, is_async=True)
        barrier()  # all have read `held`
        unit = _hold(held, state)
        before, count_before = start + offset, count
        o, seen = warpgroup_mma_wait(0, [o, seen])
        if AGAIN:
            o, lost_from = mark(o, lost_from, REVERSE, WIDE)
        if BY_ROWS:
            a_i.store(o.to(dtype))
        else:
            _write(o.to(out.dtype.element_ty), out, before, out_token, count, WIDE)
        fence_async_shared()

    if BY_ROWS:
        barrier()
        x = a_ring.index((chunks - 1) % STAGES).reshape([CHUNK, ROWS]).load(STORE)
        _write(x, out, before, out_token, count_before, STORE)
    if not AGAIN:
        say(again, state)
