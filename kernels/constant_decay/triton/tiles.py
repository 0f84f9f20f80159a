"""What kernels of tiles share, in Triton: where a tile's tokens are, and what is left of a state after some of them."""

from __future__ import annotations

import triton
import triton.language as tl

from leetdist.kernels.constant_decay.pytorch import walk

LEAST = tl.constexpr(walk.LEAST)
# Arguments that change from call to call and are in no address: no kernel is compiled anew for a special value.
COUNTS = ["tokens", "tiles", "tile_size", "unread", "to_end"]


@triton.jit
def span(table, tile, tokens, tile_size, REGULAR: tl.constexpr):
    """First token and number of tokens of a tile."""
    if REGULAR:
        start = tile.to(tl.int64) * tile_size
        length = tl.minimum(tokens - start, tile_size)
    else:
        start = tl.load(table + 2 * tile)
        length = tl.load(table + 2 * tile + 1)
    return start, length.to(tl.int32)


@triton.jit
def decay_of(log_decay, head):
    """A head's log-decay. Of -inf, which means the same as LEAST, gamma^0 would be NaN. NaN stays."""
    g = tl.load(log_decay + head)
    return tl.where(g < LEAST, LEAST, g)


@triton.jit
def powers(log_decay, exponent):
    """gamma^exponent; exponents below zero belong to tokens that are not there, and must not overflow."""
    return tl.exp(log_decay * tl.maximum(exponent, 0).to(tl.float32))
