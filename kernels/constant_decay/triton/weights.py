"""The weights of the kernels in block.py, in Triton: from one decay a head, or token by token (BY_TOKEN).

A gate is what they come from. With one decay it is the head's log-decay. Token by token it is the address of a tile's
first sums (leetdist.kernels.token_decay.triton.sums): G_i, the log-decays summed up to token i, which start anew every
ANCHOR tokens. All weights are exp of differences of two such sums, G being 0 where a sum starts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from leetdist.kernels.constant_decay.triton.parts import expm1, lost, to_state
from leetdist.kernels.constant_decay.triton.tiles import decay_of, powers

# Tokens of a tile after which sums start anew; every chunk of these kernels divides it.
ANCHOR = tl.constexpr(64)


@triton.jit
def gate_of(log_decay, batch, head, heads, start, tokens, BY_TOKEN: tl.constexpr):
    """Of a tile that begins at token `start`. log_decay: (H,), or the sums, (B, H, N, 2), both numbers read as one."""
    if BY_TOKEN:
        return log_decay.to(tl.pointer_type(tl.int64), bitcast=True) + ((batch * heads + head) * tokens + start)
    else:
        return decay_of(log_decay, head)


@triton.jit
def seen_weights(gate, offset, count, distance, REVERSE: tl.constexpr, CHUNK: tl.constexpr, BY_TOKEN: tl.constexpr):
    """(CHUNK, CHUNK): from token i to each token j that it sees; of others, which are to be masked, at most 1. offset:
    of the chunk in its tile."""
    if BY_TOKEN:
        high_i, low_i = _sums_at(gate, offset, count, tl.arange(0, CHUNK)[:, None])
        high_j, low_j = _sums_at(gate, offset, count, tl.arange(0, CHUNK)[None, :])
        if REVERSE:
            return _exp_between(high_i, low_i, high_j, low_j)
        else:
            return _exp_between(high_j, low_j, high_i, low_i)
    else:
        return powers(gate, distance)


@triton.jit
def weights_from_state(gate, offset, count, REVERSE: tl.constexpr, CHUNK: tl.constexpr, BY_TOKEN: tl.constexpr):
    """(CHUNK,): from each token to the state before the chunk, in the order of the walk."""
    i = tl.arange(0, CHUNK)
    if BY_TOKEN:
        return _to_edge(gate, offset, count, i, not REVERSE)
    else:
        return powers(gate, count - 1 - i if REVERSE else i + 1)


@triton.jit
def weights_to_state(gate, offset, count, REVERSE: tl.constexpr, CHUNK: tl.constexpr, BY_TOKEN: tl.constexpr):
    """(CHUNK,): from each token to the state after the chunk, in the order of the walk."""
    if BY_TOKEN:
        return _to_edge(gate, offset, count, tl.arange(0, CHUNK), REVERSE)
    else:
        return to_state(gate, count, REVERSE, CHUNK)


@triton.jit
def lost_across(gate, offset, count, BY_TOKEN: tl.constexpr):
    """What a chunk does to the state before it: the factor of it that is added to it, -1 to 0."""
    if BY_TOKEN:
        high, low = _sums_before(gate, offset)
        high_n, low_n = _sums_at(gate, offset, count, count - 1)
        return expm1(_between(high, low, high_n, low_n))
    else:
        return lost(gate, count)


@triton.jit
def weight_across(gate, offset, count):
    """Of the state before a chunk in the state after `count` of its tokens; token by token only."""
    high, low = _sums_before(gate, offset)
    high_n, low_n = _sums_at(gate, offset, count, count - 1)
    return _exp_between(high, low, high_n, low_n)


@triton.jit
def _to_edge(gate, offset, count, i, BEGIN: tl.constexpr):
    """From each token to the chunk's begin, itself included, or to its end."""
    high, low = _sums_at(gate, offset, count, i)
    if BEGIN:
        high_0, low_0 = _sums_before(gate, offset)
        return _exp_between(high_0, low_0, high, low)
    else:
        high_n, low_n = _sums_at(gate, offset, count, count - 1)
        return _exp_between(high, low, high_n, low_n)


@triton.jit
def _sums_at(gate, offset, count, i):
    """Of the chunk's tokens; of those that are not there, the last one's."""
    return _both(tl.load(gate + offset + tl.minimum(i, count - 1)))


@triton.jit
def _sums_before(gate, offset):
    """Before the chunk's first token."""
    return _both(tl.load(gate + offset - 1, mask=offset % ANCHOR != 0, other=0))


@triton.jit
def _both(x):
    """The two fp32 numbers in 64 bits."""
    return x.to(tl.int32).to(tl.float32, bitcast=True), (x >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _between(high, low, high_later, low_later):
    """The log-decays summed from behind one token to a later one, never above zero; NaN stays. The large numbers first:
    where they are much larger than their difference, it is exact."""
    y = (high_later - high) + (low_later - low)
    return tl.where(y > 0, 0.0, y)


@triton.jit
def _exp_between(high, low, high_later, low_later):
    return tl.exp(_between(high, low, high_later, low_later))
