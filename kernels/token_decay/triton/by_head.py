"""Between a decay a head and one a token in Triton: the decays of tokens, and what their gradients add up to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.triton.tiles import COUNTS, span
from leetdist.kernels.runtime.triton_launch import launch

BLOCK = 1024  # tokens that a program sees at a time


def of_tokens(log_decay: Tensor, tokens: int) -> Tensor:
    """(H,) to (1, H, tokens)."""
    heads = log_decay.shape[0]
    out = torch.empty(1, heads, tokens, dtype=log_decay.dtype, device=log_decay.device)
    if out.numel():
        launch(_of_tokens, (ceil_div(tokens, BLOCK), heads), (log_decay, out, tokens), {"BLOCK_": BLOCK}, num_warps=4)
    return out


def of_tiles(x: Tensor, tiles: Tiles) -> Tensor:
    """(B, H, N) fp32, contiguous, to the sum of each tile, (B, H, tiles.count) in fp64. Its order depends on the tile
    alone."""
    batch, heads, tokens = x.shape
    out = torch.empty(batch, heads, tiles.count, dtype=torch.float64, device=x.device)
    if out.numel():
        launch(
            _of_tiles, (out.numel(),), (x, out, tiles.needed_table(x.device), tokens, tiles.count, tiles.size),
            {"REGULAR": tiles.regular, "BLOCK_": BLOCK}, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _of_tokens(log_decay, out, tokens, BLOCK_: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_ + tl.arange(0, BLOCK_)
    decays = tl.zeros((BLOCK_,), tl.float32) + tl.load(log_decay + head)
    tl.store(out + head * tokens + token, decays, mask=token < tokens)


@triton.jit(do_not_specialize=COUNTS)
def _of_tiles(x, out, table, tokens, tiles, tile_size, REGULAR: tl.constexpr, BLOCK_: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tile, row = program % tiles, program // tiles
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    x += row * tokens + start
    total = tl.zeros((BLOCK_,), tl.float64)
    for offset in range(0, length, BLOCK_):
        token = offset + tl.arange(0, BLOCK_)
        total += tl.load(x + token, mask=token < length, other=0.0).to(tl.float64)
    tl.store(out + program, tl.sum(total, 0))
