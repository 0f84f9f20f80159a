"""Operands of the matrix units as sums of 16-bit numbers, and their products, in Triton.

An fp32 number is the sum of two fp16 numbers to within 2^-24 of it, once it is scaled into fp16's range by a power of
two, its *unit*, which is exact. Three products of such parts (that of the two small ones is left out) keep fp32's
accuracy at twice the speed of three tf32 products. Small parts go first, so that each is added to something small.

Tokens have units of their own where outputs are computed: with one unit a chunk, the last bit of a small number would
depend on tokens after it, and a sequence that comes in pieces would have other bits. What a chunk adds to the state has
one unit, since nobody sees it before the chunk is whole.

Source: Ootomo and Yokota, arXiv 2203.03341, section 3, with units instead of a shift of the small parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from leetdist.kernels.constant_decay.triton.tiles import powers

# The largest number is from 2^13 to 2^14 units; fp16 ends at 2^16, and has all its bits down to 2^-14.
LARGE = tl.constexpr(8192.0)
# Products of units are at least this, so that they can be divided by.
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def _unit_of(largest):
    """The unit of numbers up to `largest`, a power of two, and its inverse."""
    bits = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x20000000)
    return bits.to(tl.float32, bitcast=True) / LARGE, (0x7F000000 - bits).to(tl.float32, bitcast=True) * LARGE


@triton.jit
def unit(x):
    """The unit of a block, and its inverse."""
    return _unit_of(tl.max(tl.max(tl.abs(x), 1), 0))


@triton.jit
def units(x):
    """The units of the rows, and their inverses."""
    return _unit_of(tl.max(tl.abs(x), 1))


@triton.jit
def power_of_2(x):
    """The largest up to x, which is not below zero; the smallest normal number at least."""
    return tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def in_parts(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """x as (large, small) part; with one part, the second means nothing."""
    large = x.to(dtype)
    if PARTS == 2:
        return large, (x.to(tl.float32) - large.to(tl.float32)).to(dtype)
    return large, large


@triton.jit
def product(a, a_small, b, b_small, A: tl.constexpr, B: tl.constexpr):
    """a . b of operands in A and B parts; fp32."""
    if A == 2 and B == 2:
        return tl.dot(a, b, acc=tl.dot(a, b_small, acc=tl.dot(a_small, b)))
    elif A == 2:
        return tl.dot(a, b, acc=tl.dot(a_small, b))
    elif B == 2:
        return tl.dot(a, b, acc=tl.dot(a, b_small))
    else:
        return tl.dot(a, b)


@triton.jit
def lost(log_decay, count):
    """gamma^count - 1, to fp32's accuracy however slow the decay: an error of exp would be made anew in each chunk, and
    always to the same side."""
    return expm1(log_decay * count.to(tl.float32))


@triton.jit
def expm1(y):
    """exp(y) - 1 for y up to 0."""
    series = 1.0 + y / 8
    for n in tl.static_range(6):
        series = 1.0 + y * series * (1.0 / (7 - n))
    return tl.where(y > -0.5, y * series, tl.exp(y) - 1.0)


@triton.jit
def load_chunk(base, stride, first, count, column, columns, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """(CHUNK, COLUMNS) of the rows from `first` on, zero outside."""
    i, d = tl.arange(0, CHUNK), column + tl.arange(0, COLUMNS)
    pointers = base + (first + i)[:, None] * stride + d[None, :]
    return tl.load(pointers, mask=(i < count)[:, None] & (d < columns)[None, :], other=0.0)


@triton.jit
def seen_from(REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """(CHUNK, CHUNK): steps from token i to each token j that it sees, below zero for others."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return j - i if REVERSE else i - j


@triton.jit
def not_finite(x):
    return ~(tl.abs(x.to(tl.float32)) < float("inf"))


@triton.jit
def to_state(log_decay, count, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """(CHUNK,): gamma^(steps from each token to the state at the chunk's end)."""
    i = tl.arange(0, CHUNK)
    return powers(log_decay, i + 1 if REVERSE else count - 1 - i)
