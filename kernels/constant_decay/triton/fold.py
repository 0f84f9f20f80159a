"""The fold over tiles in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.hop import LEAST as LEAST_BLOCK
from leetdist.kernels.common.hop import TIMED, Hop, Way, await_flag, look, raise_flag
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.triton.tiles import COUNTS, decay_of, powers, span
from leetdist.kernels.runtime.triton_launch import launch

# Numbers that a program loads before it needs the first.
AHEAD = 8192


def fold(
    states: Tensor,
    initial: Tensor | None,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    to_end: bool = True,
    hop: Hop | None = None,
) -> Tensor | None:
    """See leetdist.kernels.constant_decay.pytorch.block.fold. One rounding rule: a fused multiply-add.

    Instead of (H,) log-decays, the factor of each tile (leetdist.kernels.token_decay.triton.sums.transitions).
    hop: where the states of one sequence a row come from, instead of `initial`, and go, instead of being returned.
    """
    batch, heads, _, dk, dv = states.shape
    rows, final = batch * tiles.num_segments, None
    block = LEAST_BLOCK  # numbers of the state that one program carries through all tiles
    arriving, leaving = hop or (None, None)
    if arriving is not None:
        look(arriving)
        initial, block = arriving.slot, arriving.share
    if leaving is not None:
        target, block = leaving.slot, leaving.share
    elif to_end:
        target = final = torch.empty(rows, heads, dk, dv, dtype=states.dtype, device=states.device)
    else:
        target = states
    segments = tiles.segment_table(states.device)
    most = triton.next_power_of_2(ceil_div(tiles.count, max(tiles.num_segments, 1)))
    together = min(max(most, 4), AHEAD // block)
    grid = (rows * heads, ceil_div(dk * dv, block))
    if rows * heads * dk * dv:
        launch(
            _fold,
            grid,
            (
                states, states if initial is None else initial.contiguous(), target,
                log_decay, segments,
                tiles.needed_table(states.device), heads, tiles.num_segments, tiles.num_tokens, tiles.count, tiles.size,
                int(to_end or leaving is not None), dk * dv, *_flags(arriving), *_flags(leaving),
            ),
            {
                "REGULAR": tiles.regular, "REVERSE": reverse, "HAS_INITIAL": initial is not None, "BLOCK": block,
                "BY_TOKEN": log_decay.ndim > 1, "TOGETHER": together,
                "ARRIVES": arriving is not None, "LEAVES": leaving is not None, "TIMED": TIMED,
            },
            num_warps=block // 128,
        )  # fmt: skip
    return final


def _flags(way: Way | None) -> tuple[Any, ...]:
    return (None, None, 0, 0.0, 0.0) if way is None else (way.full, way.free, *way.patience)


@triton.jit
def _tile_of(step, first, end, REVERSE: tl.constexpr):
    """The tile that is `step` tiles into the fold."""
    return end - 1 - step if REVERSE else first + step


@triton.jit(do_not_specialize=[*COUNTS, "limit", "limit_there"])
def _fold(
    states, initial, final, log_decay, segments, table, heads, num_segments, tokens, tiles, tile_size, to_end, size,
    full, read, limit, rank, other, full_there, free, limit_there, rank_again, other_there,
    REGULAR: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    BLOCK: tl.constexpr, BY_TOKEN: tl.constexpr, TOGETHER: tl.constexpr,
    ARRIVES: tl.constexpr, LEAVES: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head, segment = program % heads, program // heads % num_segments
    batch = program // heads // num_segments
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    piece = program * tl.num_programs(1) + tl.program_id(1)
    if BY_TOKEN:
        log_decay += (batch * heads + head) * tiles
    else:
        g = decay_of(log_decay, head)
    states += (batch * heads + head) * tiles * size + element
    first, end = tl.load(segments + segment), tl.load(segments + segment + 1)

    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL and not ARRIVES:
        carry = tl.load(initial + program * size + element, mask=inside, other=0.0)
    # The sums are a chain, the loads are not: those of some tiles are on their way together.
    count = end - first
    known = count - 1 + to_end  # nothing is read behind the last
    for begin in range(0, count, TOGETHER):
        added, lasts = (), ()  # of tiles: what they add; tokens, or factors
        for ahead in tl.static_range(TOGETHER):
            step = begin + ahead
            tile = _tile_of(step, first, end, REVERSE)
            added += (tl.load(states + tile * size, mask=tl.where(step < known, inside, False), other=0.0),)  # type: ignore[assignment]
            if BY_TOKEN:
                last = tl.load(log_decay + tile, mask=step < count, other=0.0)
            else:
                there = _tile_of(tl.minimum(step, count - 1), first, end, REVERSE)
                _, last = span(table, there, tokens, tile_size, REGULAR)
            lasts += (last,)  # type: ignore[assignment]
        if ARRIVES or LEAVES:
            if begin == 0:  # behind the loads, which wait for nobody
                if LEAVES:
                    await_flag(free + piece, 0, limit_there, rank_again, other_there, TIMED)
                if ARRIVES:
                    await_flag(full + piece, 0, limit, rank, other, TIMED)
                    carry = tl.load(initial + program * size + element)
        for ahead in tl.static_range(TOGETHER):
            step = begin + ahead
            tile = _tile_of(step, first, end, REVERSE)
            tl.store(states + tile * size, carry, mask=tl.where(step < count, inside, False))
            keep = lasts[ahead] if BY_TOKEN else powers(g, lasts[ahead])
            then = tl.fma(carry, tl.zeros_like(carry) + keep, added[ahead])
            carry = tl.where(step < count, then, carry)
    tl.store(final + program * size + element, carry, mask=tl.where(to_end == 1, inside, False))
    if LEAVES:
        raise_flag(full_there + piece)
    if ARRIVES:
        raise_flag(read + piece)
