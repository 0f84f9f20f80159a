"""Sums of log-decays in Triton, token by token and of whole tiles.

They are sums of integers, multiples of UNIT, so no bit depends on the order in which threads take them. UNIT is far
below what a weight's last bit is worth: a million tokens, each rounded to the same side, are off by 3e-8.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.triton.tiles import COUNTS, span
from leetdist.kernels.constant_decay.triton.weights import ANCHOR
from leetdist.kernels.runtime.triton_launch import launch

# exp of it is 0 in fp32; of -inf, differences would be NaN. A block of such sums fits into 64 bits.
LEAST = tl.constexpr(-128.0)
UNIT = tl.constexpr(2.0**-44)
# Tokens that one program sums at a time: one after the other, and in all.
BLOCK = 1024
LEAST_BLOCK, MOST_BLOCK = 1024, 4096


def token_sums(log_decay: Tensor, tiles: Tiles, only: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Of each token, the log-decays from the last ANCHOR in its tile up to it: (B, H, N, 2) fp32, contiguous, whose two
    numbers add up to the sum to within 2^-48 of it; in `out` if given.

    log_decay: (B, H, N) fp32, any strides. A decay that is positive or NaN makes NaN of the sums from it on. only:
    (B * H * tiles.count,), 0 for tiles whose sums nobody reads.
    """
    batch, heads, tokens = log_decay.shape
    sums = out
    if sums is None:
        sums = torch.empty(batch, heads, tokens, 2, dtype=torch.float32, device=log_decay.device)
    if sums.numel():
        constants = {"REGULAR": tiles.regular, "ROWS": BLOCK // ANCHOR.value, "ANCHOR_": ANCHOR.value}
        programs = batch * heads * tiles.count
        launch(_token_sums, (programs,), (log_decay, sums, only, *_places(log_decay, tiles)), constants)
    return sums


def sums_of(log_decay: Tensor, tiles: Tiles) -> Tensor:
    """`token_sums`, unless they are given."""
    return log_decay if log_decay.ndim == 4 else token_sums(log_decay, tiles)


def transitions(log_decay: Tensor, tiles: Tiles) -> Tensor:
    """Of each tile, the factor with which it takes over the state before it: (B, H, tiles) fp32, rounded once."""
    keep = torch.empty(*log_decay.shape[:2], tiles.count, dtype=torch.float32, device=log_decay.device)
    if keep.numel():
        usual = triton.next_power_of_2(ceil_div(log_decay.shape[2], tiles.count))
        block = min(max(usual, LEAST_BLOCK), MOST_BLOCK)  # a tile's tokens are asked for together
        constants = {"REGULAR": tiles.regular, "BLOCK": block}
        warps, given = block // 512, (log_decay, keep, *_places(log_decay, tiles))
        launch(_transitions, (keep.numel(),), given, constants, num_warps=warps)
    return keep


def _places(log_decay: Tensor, tiles: Tiles) -> tuple[Any, ...]:
    _, heads, tokens = log_decay.shape
    return tiles.needed_table(log_decay.device), *log_decay.stride(), heads, tokens, tiles.count, tiles.size


@triton.jit
def _units(g):
    """Log-decays in units, towards 0: integers that fp32 holds. One that is positive or NaN is NaN."""
    whole = tl.ceil(tl.where(g > LEAST, g, LEAST) * (1.0 / UNIT))
    return tl.where(g <= 0, whole, float("nan"))


@triton.jit(do_not_specialize=COUNTS)
def _token_sums(
    log_decay, sums, only, table, decay_batch, decay_head, decay_token, heads, tokens, tiles, tile_size,
    REGULAR: tl.constexpr, ROWS: tl.constexpr, ANCHOR_: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if only is not None:
        if tl.load(only + program) == 0:
            return
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    log_decay += batch * decay_batch + head * decay_head + start * decay_token
    sums += 2 * ((batch * heads + head) * tokens + start)
    for offset in range(0, length, ROWS * ANCHOR_):
        i = offset + tl.arange(0, ROWS)[:, None] * ANCHOR_ + tl.arange(0, ANCHOR_)[None, :]
        units = _units(tl.load(log_decay + i.to(tl.int64) * decay_token, mask=i < length, other=0.0))
        bad = tl.where(units <= 0, 0, 1)
        summed = tl.cumsum(tl.where(bad == 1, 0.0, units).to(tl.int64), 1).to(tl.float64) * UNIT
        summed = tl.where(tl.cumsum(bad, 1) > 0, float("nan"), summed)
        high = summed.to(tl.float32)
        tl.store(sums + 2 * i, high, mask=i < length)
        tl.store(sums + 2 * i + 1, (summed - high.to(tl.float64)).to(tl.float32), mask=i < length)


@triton.jit(do_not_specialize=COUNTS)
def _transitions(
    log_decay, keep, table, decay_batch, decay_head, decay_token, heads, tokens, tiles, tile_size,
    REGULAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    log_decay += batch * decay_batch + head * decay_head + start * decay_token
    # Lane by lane, and over lanes but once, in fp64: exact up to 2^53 units, 512, of which exp is 0 in fp32 by far.
    total = tl.zeros((BLOCK,), tl.float64)
    for offset in range(0, length, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        g = tl.load(log_decay + i.to(tl.int64) * decay_token, mask=i < length, other=0.0)
        total += _units(g).to(tl.float64)
    tl.store(keep + program, tl.exp(tl.sum(total, 0) * UNIT).to(tl.float32))
