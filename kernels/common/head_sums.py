"""What tiles add to the gradient of an input a head, joined and added up in Triton: by launches, which repeat."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import ceil_div
from leetdist.kernels.runtime.triton_launch import launch

BLOCK = 256  # tiles that a program sees at a time
COUNTS = ["batch", "tiles", "more"]


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """See leetdist.kernels.common.sums.tiles_joined. parts: (B, H, tiles) of fp64, the second contiguous."""
    batch, heads = parts[0].shape[:2]
    length = sum(x.shape[2] for x in parts)
    out = torch.empty(batch, heads, length, dtype=torch.float64, device=parts[0].device)
    if out.numel():
        launch(
            _joined, (ceil_div(length, BLOCK), batch * heads), (*_parts(parts), out, heads),
            {"BLOCK_": BLOCK}, num_warps=4,
        )  # fmt: skip
    return out


def add_up(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """See leetdist.kernels.common.sums.sum_of_tiles. like: (H,)."""
    out = torch.empty_like(like)
    heads = out.shape[0]
    own, theirs, *strides, tiles, more = _parts(parts or (out[None, :, None],))
    batch = parts[0].shape[0] if parts else 0
    sums = torch.empty(heads, max(1, batch * (tiles + more)), dtype=torch.float64, device=out.device)
    if heads:
        launch(
            _add_up, (heads,), (own, theirs, *strides, tiles, more, out, sums, batch),
            {"BLOCK_": BLOCK}, num_warps=4,
        )  # fmt: skip
    return out


def _parts(parts: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Both, the first one's strides, and how many tiles each has. Where there is one, the second has none."""
    own, theirs = parts[0], parts[-1]
    return own, theirs, *own.stride(), own.shape[2], theirs.shape[2] if len(parts) == 2 else 0


@triton.jit
def _load(own, theirs, own_batch, own_head, own_tile, tiles, more, batch, head, heads, tile, inside):
    """The tile's share: of this rank's, and then of the others'."""
    mine = tl.load(own + batch * own_batch + head * own_head + tile * own_tile, mask=inside & (tile < tiles), other=0.0)
    place = (batch * heads + head) * more + tile - tiles
    other = tl.load(theirs + place, mask=inside & (tile >= tiles), other=0.0)
    return tl.where(tile < tiles, mine, other)


@triton.jit(do_not_specialize=COUNTS)
def _joined(own, theirs, own_batch, own_head, own_tile, tiles, more, out, heads, BLOCK_: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * BLOCK_ + tl.arange(0, BLOCK_)
    length = tiles + more
    x = _load(
        own, theirs, own_batch, own_head, own_tile, tiles, more, row // heads, row % heads, heads, tile, tile < length
    )
    tl.store(out + row * length + tile, x, mask=tile < length)


@triton.jit(do_not_specialize=COUNTS)
def _add_up(own, theirs, own_batch, own_head, own_tile, tiles, more, out, sums, batch, BLOCK_: tl.constexpr):
    """leetdist.kernels.common.sums.sum_in_pairs of a head's tiles, entry after entry of the batch, each level in the
    place of the one before."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    each = tiles + more
    count = batch * each
    sums += head * tl.maximum(count, 1)
    for begin in range(0, count, BLOCK_):
        i = begin + tl.arange(0, BLOCK_)
        entry = (i // tl.maximum(each, 1)).to(tl.int64)
        x = _load(
            own, theirs, own_batch, own_head, own_tile, tiles, more, entry, head, heads, i - entry * each, i < count
        )
        tl.store(sums + i, x.to(tl.float64), mask=i < count)
    while count > 1:
        half = count // 2
        tl.debug_barrier()
        for begin in range(0, half, BLOCK_):
            i = begin + tl.arange(0, BLOCK_)
            pairs = tl.load(sums + i, mask=i < half, other=0.0) + tl.load(sums + half + i, mask=i < half, other=0.0)
            tl.store(sums + i, pairs, mask=i < half)
        tl.debug_barrier()
        if count % 2 == 1:
            tl.store(sums + half, tl.load(sums + 2 * half))
        count -= half
    tl.debug_barrier()
    total = tl.load(sums, mask=batch * each > 0, other=0.0)
    tl.store(out + head, total.to(out.dtype.element_ty))
