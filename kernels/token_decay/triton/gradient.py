"""The gradient of a decay a token in Triton.

The decay of token t scales what goes from tokens before it to tokens from it on, so its gradient is the sum of all that
goes so. Within a chunk, with S the state at its start, R the gradient of the state at its end, G the sums of log-decays
from its start to a token, and n its last:

    dg_t = sum_{j < t <= i} M_ij + sum_{i >= t} A_i + sum_{j < t} B_j + E
    M_ij = scale exp(G_i - G_j) (q_i . k_j) (v_j . do_i)     A_i = scale exp(G_i) q_i^T S do_i
    B_j  = exp(G_n - G_j) k_j^T R v_j                        E   = exp(G_n) <S, R>

No term is a difference of larger ones (the textbook's sum of q . dq - k . dk is one, and loses all digits of a strong
decay). E wants S and R of the same chunk, whose walks go in opposite directions. So some tiles at a time, one kernel
walks forward and keeps S, one adds M and A of each chunk by itself, and one walks backward with R and adds B and E. (As
one kernel they want more registers than there are.)

Operands of the products (leetdist.kernels.constant_decay.triton.parts): of fp32 two fp16 numbers in units; beside
16-bit inputs one number, but of tokens on their way to a state two, or states would be as inexact as their terms.

Source: Mamba-2, arXiv 2405.21060, appendix on gradients, for the form by chunks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.memory import step_of
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.triton.configs import Config, padded
from leetdist.kernels.runtime.triton_launch import launch
from leetdist.kernels.token_decay.triton.gradient_kernels import (
    add_behind_kernel,
    add_inside_kernel,
    keep_states_kernel,
)
from leetdist.kernels.token_decay.triton.sums import sums_of

# Bytes of kept states at most, where more than one tile is walked at a time.
KEPT = 512 << 20


def decay_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    ends: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of log_decay: (B, H, N) fp32, in `out` if given, where other tiles' may be.

    q, k, v: (B, H or fewer, N, Dk or Dv), do: (B, H, N, Dv), fp32, bf16 or fp16; states, ends: (B, H, tiles.count, Dk,
    Dv) fp32, contiguous (or zero_states), the state at each tile's start and the gradient of the state at its end.
    """
    batch, heads, tokens, columns = do.shape
    rows = q.shape[3]
    config, parts = gradient_config(rows, columns, q.dtype, tiles.size), 2 if q.dtype == torch.float32 else 1
    if out is None:
        out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    target = out.contiguous()
    tasks, chunks = batch * heads * tiles.count, ceil_div(min(tiles.size, tokens), config.chunk)
    if not out.numel():
        return out
    place = parts * padded(rows) * config.columns
    together = max(
        1, min(tasks, _processors(q.device) * (2 if config.columns <= 64 else 1), KEPT // (2 * place * chunks))
    )
    kept = torch.empty(together, chunks, place, dtype=torch.float16 if parts == 2 else q.dtype, device=q.device)
    units = torch.empty(together, chunks, dtype=torch.float32, device=q.device)
    sums, table = sums_of(log_decay, tiles), tiles.needed_table(q.device)
    constants = {
        "REGULAR": tiles.regular, "CHUNK": config.chunk, "ROWS": padded(rows), "COLUMNS": config.columns,
        "PARTS": parts,
    }  # fmt: skip
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
    inside: dict[str, Any] = {"num_warps": inside_warps(config, rows, q.dtype), "num_stages": 1}
    shared = heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1]
    # A column of a tile after the other adds to the same gradients.
    for first in range(0, tasks, together):
        grid = (min(together, tasks - first),)
        for column in range(0, columns, config.columns):
            counts = tokens, tiles.count, tiles.size, first, chunks, column, rows, columns
            launch(
                keep_states_kernel, grid,
                (
                    k, v, states, step_of(states), sums, kept, units, table, *k.stride()[:3], *v.stride()[:3],
                    *shared, *counts,
                ),
                constants, **options,
            )  # fmt: skip
            launch(
                add_inside_kernel, (grid[0], chunks),
                (
                    q, k, v, do, sums, target, kept, units, table, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                    *do.stride()[:3], *shared, *counts, scale,
                ),
                {**constants, "FIRST": column == 0}, **inside,
            )  # fmt: skip
            launch(
                add_behind_kernel, grid,
                (
                    q, k, v, do, ends, step_of(ends), sums, target, kept, units, table, *q.stride()[:3],
                    *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *shared, *counts, scale,
                ),
                constants, **options,
            )  # fmt: skip
    return out if target is out else out.copy_(target)


def gradient_config(rows: int, columns: int, dtype: torch.dtype, tile: int) -> Config:
    """Of the two walks. As constant_decay.triton.configs.block_config: depends on head sizes and dtype, and fits into
    sm_80. On an H200, 131,072 tokens in bf16, ms for 32 heads of 128 x 128 and 64 of 128 x 64: all columns at once 8.5
    and 9.2 (with 4 warps), 64 and 8 warps 13.0 and 12.3, 32 columns 15.7 and 14.7; two stages 9.2 and 9.6."""
    rows, columns = padded(rows), padded(columns)
    wide = dtype == torch.float32
    chunk = min(32 if wide and rows > 64 else 64, tile)
    held = min(columns, (32 if rows > 64 else 64) if wide else 32 if rows > 128 else 128)
    fewer = rows < 64 or (rows == 128 and held == 64 and not wide)  # of 4 warps, two programs fit on a processor
    return Config(chunk=chunk, columns=held, warps=4 if fewer else 8, stages=1)


def inside_warps(config: Config, rows: int, dtype: torch.dtype) -> int:
    """Of the kernel that goes chunk by chunk: fewer, so that a processor has more chunks at a time."""
    return 4 if dtype != torch.float32 and padded(rows) == 128 else config.warps


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    """How many programs are at work at a time: each keeps the states of one tile."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
