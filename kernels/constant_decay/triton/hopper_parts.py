"""What the wide Hopper kernels are made of: layouts, operands in parts, their products, decays. In Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from leetdist.kernels.constant_decay.triton.hopper_kernels import LOG2E, bounded, exp2
from leetdist.kernels.runtime.gluon import async_load

# As in leetdist.kernels.constant_decay.triton.parts, which says what units are.
LARGE = gl.constexpr(8192.0)
SMALLEST = gl.constexpr(2.0**-126)


@gluon.constexpr_function
def accumulator(rows, columns, num_warps):
    """The warpgroups share the rows, or, of 64, which is a warpgroup's least, the columns."""
    if rows >= 16 * num_warps:
        return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, columns, 16])
    return gl.NVMMADistributedLayout([3, 0], [4, num_warps // 4], [16, columns * 4 // num_warps, 16])


@gluon.constexpr_function
def by_rows(columns, bits, num_warps):
    """16 bytes a thread, whole rows a warp."""
    vector = 128 // bits
    threads = min(32, columns // vector)
    return gl.BlockedLayout([1, vector], [32 // threads, threads], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def shared_layout(rows, columns, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@gluon.jit
def _unit_of(largest):
    """See leetdist.kernels.constant_decay.triton.parts."""
    bits = gl.maximum(largest.to(gl.int32, bitcast=True) & 0x7F800000, 0x20000000)
    return bits.to(gl.float32, bitcast=True) / LARGE, (0x7F000000 - bits).to(gl.float32, bitcast=True) * LARGE


@gluon.jit
def unit_of_block(x):
    """The unit of a block, and its inverse."""
    return _unit_of(gl.max(gl.abs(x), None))


@gluon.jit
def units_of_rows(x, LAYOUT: gl.constexpr):
    """The units of the rows, and their inverses. A warp has whole rows, and the bits of what is not negative are in its
    order: of integers, lanes have the largest in one instruction, of floats in ten that wait for each other."""
    ROWS: gl.constexpr = x.shape[0]
    VECTOR: gl.constexpr = 128 // x.dtype.primitive_bitwidth
    largest = gl.maximum(gl.max(gl.abs(x).reshape([ROWS, x.shape[1] // VECTOR, VECTOR]), 2), 0.0)
    largest = gl.max(largest.to(gl.int32, bitcast=True), 1).to(gl.float32, bitcast=True)
    return _unit_of(gl.convert_layout(largest, gl.SliceLayout(1, LAYOUT)))


@gluon.jit
def put(shared, x, PARTS: gl.constexpr, zero):
    """Store x as the sum of 16-bit numbers."""
    large = x.to(shared.dtype)
    shared.index(zero).store(large)
    if PARTS == 2:
        shared.index(1 + zero).store((x - large.to(gl.float32)).to(shared.dtype))


@gluon.jit
def matrix(shared):
    """What bulk copies bring, (1, 1, rows, columns), as a matrix."""
    return shared.reshape([shared.shape[2], shared.shape[3]])


@gluon.jit
def _part(x, number, TRANSPOSED: gl.constexpr):
    x = x.index(number)
    if TRANSPOSED:
        x = x.permute((1, 0))
    return x


@gluon.jit
def product(
    a, A_PARTS: gl.constexpr, b, B_PARTS: gl.constexpr, total, zero,
    ADD: gl.constexpr, A: gl.constexpr = False, B: gl.constexpr = False,
):  # fmt: skip
    """a . b (added to `total`, with ADD) of operands in parts, under way; A, B: that operand transposed."""
    if A_PARTS == 2:
        total = warpgroup_mma(_part(a, 1 + zero, A), _part(b, zero, B), total, use_acc=ADD, is_async=True)
    if B_PARTS == 2:
        add: gl.constexpr = ADD or A_PARTS == 2
        total = warpgroup_mma(_part(a, zero, A), _part(b, 1 + zero, B), total, use_acc=add, is_async=True)
    add_last: gl.constexpr = ADD or A_PARTS == 2 or B_PARTS == 2
    return warpgroup_mma(_part(a, zero, A), _part(b, zero, B), total, use_acc=add_last, is_async=True)


@gluon.jit
def powers(g, exponent):
    return exp2(g * gl.maximum(exponent, 0).to(gl.float32))


@gluon.jit
def to_state(g, count, zero, CHUNK: gl.constexpr, REVERSE: gl.constexpr, LAYOUT: gl.constexpr):
    """(CHUNK, 1): gamma^(steps from each token to the state at the chunk's end)."""
    i = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT)) + zero
    return powers(g, i + 1 if REVERSE else count - 1 - i)[:, None]


@gluon.jit
def seen_from(zero, CHUNK: gl.constexpr, REVERSE: gl.constexpr, LAYOUT: gl.constexpr):
    """(CHUNK, CHUNK): steps from token i to each token j that it sees, below zero for others."""
    i = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))[:, None] + zero
    j = gl.arange(0, CHUNK, gl.SliceLayout(0, LAYOUT))[None, :]
    return j - i if REVERSE else i - j


@gluon.jit
def lost_across(g, count):
    """See leetdist.kernels.constant_decay.triton.parts.lost; g = log2 gamma."""
    y = g * (count.to(gl.float32) * 0.6931471805599453)
    series = 1.0 + y / 8
    for n in gl.static_range(6):
        series = 1.0 + y * series * (1.0 / (7 - n))
    return gl.where(y > -0.5, y * series, exp2(g * count.to(gl.float32)) - 1.0)


@gluon.jit
def reread(log_decay, head):
    """log2 gamma, and 0. The compiler knows neither, so that it computes what depends on them (decays, addresses) anew
    in each chunk. Held from one to the next, they would spill: 1,000 bytes a thread, and 40 like this."""
    g = bounded(gl.load(log_decay + head, volatile=True)) * LOG2E
    return g, gl.where(g > 0, 1, 0)


@gluon.jit
def hold(held, state, PARTS: gl.constexpr, zero):
    """Store the state as an operand, and return its unit."""
    unit = 1.0
    if held.dtype == gl.float16:  # a state can exceed fp16's range: it grows with the sequence
        unit, inverse = unit_of_block(state)
        put(held, state * inverse, PARTS, zero)
    else:
        put(held, state, PARTS, zero)
    return unit


@gluon.jit
def fetch(desc, batch, head, token, column, ready, shared, more):
    async_load(desc, [batch, head, token, column], ready, shared, pred=more)
