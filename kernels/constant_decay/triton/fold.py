"""The fold over tiles in Triton, and what its kernel shares with those of constant_decay.triton.block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.launch import launch
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.pytorch import walk

LEAST = tl.constexpr(walk.LEAST)
# Elements of the state that one program of the fold carries through all tiles.
FOLD_BLOCK = 512
# Arguments that change from call to call and are in no address: no kernel is compiled anew for a special value.
COUNTS = ["tokens", "tiles", "tile_size", "unread", "to_end"]


def fold(
    states: Tensor, initial: Tensor | None, log_decay: Tensor, tiles: Tiles, *, reverse: bool, to_end: bool = True
) -> Tensor | None:
    """See leetdist.kernels.constant_decay.pytorch.block.fold. One rounding rule: a fused multiply-add.

    Instead of (H,) log-decays, the factor of each tile (leetdist.kernels.token_decay.triton.sums.transitions).
    """
    batch, heads, _, dk, dv = states.shape
    rows, final = batch * tiles.num_segments, None
    if to_end:
        final = torch.empty(rows, heads, dk, dv, dtype=states.dtype, device=states.device)
    segments = tiles.segment_table(states.device)
    together = min(max(triton.next_power_of_2(ceil_div(tiles.count, max(tiles.num_segments, 1))), 4), 16)
    grid = (rows * heads, ceil_div(dk * dv, FOLD_BLOCK))
    if rows * heads * dk * dv:
        launch(
            _fold,
            grid,
            (
                states, states if initial is None else initial.contiguous(), states if final is None else final,
                log_decay, segments,
                _table(tiles, states.device), heads, tiles.num_segments, tiles.num_tokens, tiles.count, tiles.size,
                int(to_end), dk * dv,
            ),
            {
                "REGULAR": tiles.regular, "REVERSE": reverse, "HAS_INITIAL": initial is not None, "BLOCK": FOLD_BLOCK,
                "BY_TOKEN": log_decay.ndim > 1, "TOGETHER": together,
            },
        )  # fmt: skip
    return final


def _table(tiles: Tiles, device: torch.device) -> Tensor | None:
    return None if tiles.regular else tiles.table(device)


@triton.jit
def _span(table, tile, tokens, tile_size, REGULAR: tl.constexpr):
    """First token and number of tokens of a tile."""
    if REGULAR:
        start = tile.to(tl.int64) * tile_size
        length = tl.minimum(tokens - start, tile_size)
    else:
        start = tl.load(table + 2 * tile)
        length = tl.load(table + 2 * tile + 1)
    return start, length.to(tl.int32)


@triton.jit
def _decay_of(log_decay, head):
    """A head's log-decay. Of -inf, which means the same as LEAST, gamma^0 would be NaN. NaN stays."""
    g = tl.load(log_decay + head)
    return tl.where(g < LEAST, LEAST, g)


@triton.jit
def _powers(log_decay, exponent):
    """gamma^exponent; exponents below zero belong to tokens that are not there, and must not overflow."""
    return tl.exp(log_decay * tl.maximum(exponent, 0).to(tl.float32))


@triton.jit
def _tile_of(step, first, end, REVERSE: tl.constexpr):
    """The tile that is `step` tiles into the fold."""
    return end - 1 - step if REVERSE else first + step


@triton.jit(do_not_specialize=COUNTS)
def _fold(
    states, initial, final, log_decay, segments, table, heads, num_segments, tokens, tiles, tile_size, to_end, size,
    REGULAR: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    BLOCK: tl.constexpr, BY_TOKEN: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head, segment = program % heads, program // heads % num_segments
    batch = program // heads // num_segments
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    if BY_TOKEN:
        log_decay += (batch * heads + head) * tiles
    else:
        g = _decay_of(log_decay, head)
    states += (batch * heads + head) * tiles * size + element
    first, end = tl.load(segments + segment), tl.load(segments + segment + 1)

    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        carry = tl.load(initial + program * size + element, mask=inside, other=0.0)
    # The sums are a chain, the loads are not: those of some tiles are on their way together.
    count = end - first
    read = count - 1 + to_end  # nothing is read behind the last
    for begin in range(0, count, TOGETHER):
        added, lasts = (), ()  # of tiles: what they add; tokens, or factors
        for ahead in tl.static_range(TOGETHER):
            step = begin + ahead
            tile = _tile_of(step, first, end, REVERSE)
            added += (tl.load(states + tile * size, mask=tl.where(step < read, inside, False), other=0.0),)  # type: ignore[assignment]
            if BY_TOKEN:
                last = tl.load(log_decay + tile, mask=step < count, other=0.0)
            else:
                there = _tile_of(tl.minimum(step, count - 1), first, end, REVERSE)
                _, last = _span(table, there, tokens, tile_size, REGULAR)
            lasts += (last,)  # type: ignore[assignment]
        for ahead in tl.static_range(TOGETHER):
            step = begin + ahead
            tile = _tile_of(step, first, end, REVERSE)
            tl.store(states + tile * size, carry, mask=tl.where(step < count, inside, False))
            keep = lasts[ahead] if BY_TOKEN else _powers(g, lasts[ahead])
            then = tl.fma(carry, tl.zeros_like(carry) + keep, added[ahead])
            carry = tl.where(step < count, then, carry)
    tl.store(final + program * size + element, carry, mask=tl.where(to_end == 1, inside, False))
