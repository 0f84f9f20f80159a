"""All gradients of a decay a token where heads share q and k, four or more, and v has 64 columns (Mamba-2), in bf16.

dq and dk are sums over heads (shared.py). Beside dv, paired_gradients.cu leaves what the gradient of log_decay is a sum
of: leetdist.kernels.token_decay.triton.gradient says of what, and added_up.py adds it up. Tiles in which something is
not finite are given to the former.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from leetdist.kernels.common import loader
from leetdist.kernels.common.tensor_map import MAP_BYTES
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.token_decay.cuda.shared import FOUR, WIDTH, place_of_tiles

GROUPS = 2  # warpgroups of a block


def flows(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    states: Tensor,
    starts: Tensor | None,
    log_decay: Tensor,
    tiles: Tiles,
    of_tokens: Tensor,
    pairs: Tensor | None,
    *,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A launch of paired_gradients.cu, early or (with `starts`) late.

    operands: q, k, v, do, or late k, q, do, v; states: (B, H, tiles.count, Dk, 64) fp32, contiguous, those that the
    pass begins with, and `starts` what the early pass began with; of_tokens, pairs: (B, H, N) fp32, heads apart by the
    same distance in all batch entries, where A and the pairs are written, or B; out: where dv is. Returns <S, R> at
    each tile's start, late, and in which tiles something is not finite: (B, H, tiles.count).
    """
    late = starts is not None
    batch, heads, tokens = log_decay.shape
    blocks = batch * heads // FOUR * tiles.count
    across = torch.empty(batch, heads, tiles.count, dtype=torch.float32, device=states.device)
    lost = torch.empty(batch, heads, tiles.count, dtype=torch.int32, device=states.device)
    if not blocks or not tokens:
        return across, lost.zero_()
    again = torch.empty(blocks, dtype=torch.int32, device=states.device)
    kept: list[Tensor] = []
    scales = (float(scale), 1.0, scale_of_added(float(scale), 1.0)) if late else (float(scale), float(scale), 1.0)
    arguments = (
        *(x for operand in operands for x in hopper._operand(operand, heads, kept)),
        states.data_ptr(), (states if starts is None else starts).data_ptr(),
        *((bytes(MAP_BYTES), 0, 0, 0, 0) if out is None else (hopper._map(out), out.data_ptr(), *out.stride()[:3])),
        of_tokens.data_ptr(), of_tokens.stride(1), *((0, 0) if pairs is None else (pairs.data_ptr(), pairs.stride(1))),
        across.data_ptr(), lost.data_ptr(), *place_of_tiles(tiles, log_decay, 1, FOUR, *operands[:2]), *scales,
        again.data_ptr(),
    )  # fmt: skip
    for name in hopper.OUTPUTS if late else hopper.OUTPUTS[:1]:
        launch = _kernel(name, operands[0].shape[3], late, states.device)
        launch((blocks,), GROUPS * hopper.THREADS, *arguments)
    return across, lost


def shared_memory(name: str, rows: int, late: bool) -> int:
    """Bytes that a block asks for; how many chunks there are of each operand is as in the kernel."""
    heads = FOUR
    chunks = 2 * (2 * rows // 64 + 2 * heads) + (GROUPS if late else 1)
    own = (1 if late else 2) * 4 * 64 * 4 + 2 * hopper.SLOT + hopper.TABLES["tile_outputs"][True]
    lost = 4 * (WIDTH + 4) if name == hopper.AGAIN else 0
    return chunks * hopper.BLOCK + heads * (own + lost) + 1024 + 64  # where blocks begin, and barriers


@cache
def _kernel(name: str, rows: int, late: bool, device: torch.device) -> loader.Kernel:
    made = hopper.defines(name, rows, WIDTH, GROUPS, torch.bfloat16, False, late, True)
    return loader.kernel(
        "token_decay/cuda/paired_gradients.cu", "paired_gradients", device, made,
        shared_memory=shared_memory(name, rows, late), features="a",
    )  # fmt: skip
