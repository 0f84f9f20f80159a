"""All gradients of a decay a token where heads share q and k, in fours, and v has 64 columns (Mamba-2), in bf16.

dq and dk are sums over heads (shared.py). The terms of the gradient of log_decay
(leetdist.kernels.token_decay.triton.gradient says which there are) are left in memory on the way: late by
paired_gradients.cu, beside dv; early by the same, or by dq's kernel where q and k have GROUPED_COLUMNS.
leetdist.kernels.token_decay.triton.added_up adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.memory import address_of
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper, launches
from leetdist.kernels.constant_decay.cuda.operands import operand_arguments
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.runtime.tensor_map import MAP_BYTES, map_of
from leetdist.kernels.token_decay.cuda import shared
from leetdist.kernels.token_decay.cuda.gradients import place_of, placed
from leetdist.kernels.token_decay.cuda.hopper import tile_outputs
from leetdist.kernels.token_decay.cuda.shared import FOUR, GROUPED_COLUMNS, WIDTH, place_of_tiles

GROUPS = 2  # warpgroups of a block

configuration = hopper.configuration


def early_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    scale: float,
    out: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """dq, added up over heads as leetdist.kernels.token_decay.cuda.hopper.tile_outputs does, and what `late_gradients`
    is to be told.

    q, k: (B, heads, N, Dk) bf16, of which H / heads is a multiple of 4; v, do: (B, H, N, 64) bf16; states: (B, H,
    tiles.count, Dk, 64) fp32, contiguous, at the tiles' starts; log_decay: (B, H, N) fp32. What is kept, by name: as
    leetdist.kernels.token_decay.cuda.gradients.early_gradients, "read" in one sum, and "pairs" (B, H, 2, N) fp32, in
    whose second half is what goes from token to token. weight: of v (B, H, N) fp32, which all gradients then are of
    weight * v.
    """
    batch, heads, tokens = log_decay.shape
    read, pairs = (torch.empty(batch, heads, n, tokens, dtype=torch.float32, device=q.device) for n in (1, 2))
    sums = read[:, :, 0], pairs[:, :, 1]
    outputs = do, v, k, states.mT, log_decay, tiles
    options: dict[str, Any] = {"reverse": False, "scale": scale, "state_scale": scale, "out": out, "weight": weight}
    if q.shape[3] == GROUPED_COLUMNS:
        lost = torch.empty(batch, heads, tiles.count, dtype=torch.int32, device=q.device)
        dq = shared.summed_outputs(*outputs, **options, flows=(q, *sums, lost))
    else:
        dq = tile_outputs(*outputs, **options, out_dtype=torch.float32)
        _, lost = flows((q, k, v, do), states, None, log_decay, weight, tiles, *sums, scale=scale)
    return dq, {"read": read, "pairs": pairs, "early_lost": lost}


def late_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    ends: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    kept: dict[str, Tensor],
    *,
    scale: float,
    outs: tuple[Tensor | None, ...] = (None,) * 3,
    weight: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dk, added up as dq, dv and the gradient of log_decay (B, H, N) fp32, in `outs` where they are given.

    ends: the gradient of the state at each tile's end, as `states`; kept: what `early_gradients` has returned. dv is
    that of v times its weights; or with a fourth of `outs`, given or None, that of v itself, and the weight's follows,
    (B, H, N) fp32. With a fifth, `skip`, (H,) fp32, times v is in the outputs: what v gets by that is in dv, and what
    skip gets follows, token by token.
    """
    from leetdist.kernels.token_decay.triton.added_up import added_up

    options: dict[str, Any] = {"reverse": True, "scale": scale, "state_scale": 1.0, "out_dtype": torch.float32}
    dk = tile_outputs(v, do, q, ends.mT, log_decay, tiles, out=outs[0], weight=weight, **options)
    dv, written = place_of(k, do, log_decay, outs[1]), kept["pairs"]
    given = (k, q, do, v), ends, states, log_decay, weight, tiles
    # A given place has sums of other tiles too.
    sums = [states.new_empty(log_decay.shape) if out is None else out.contiguous() for out in outs[3:]]
    across, lost = flows(*given, written[:, :, 0], None, scale=scale, out=dv, sums=sums, skip=skip)
    grad = added_up(
        q, k, v, do, states, ends, log_decay, tiles, kept["read"], written, across, (kept["early_lost"], lost),
        scale=scale, out=outs[2], weight=weight,
    )  # fmt: skip
    return dk, placed(dv, outs[1]), grad, *(placed(x, out) for x, out in zip(sums, outs[3:], strict=True))


def compile_for(
    step: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    wide: bool,
    reverse: bool,
    programs: int,
    device: torch.device,
    *,
    share: int,
    weighted: bool = False,
) -> None:
    """See leetdist.kernels.constant_decay.cuda.hopper.compile_for."""
    late = step == "late_gradients"
    flowing = not late and rows == GROUPED_COLUMNS
    shared.compile_for(
        "tile_outputs", columns, rows, dtype, True, late, programs, device, share, weighted=weighted, flows=flowing
    )
    for name in launches.OUTPUTS if late else launches.OUTPUTS[: not flowing]:
        _kernel(name, rows, late, weighted, device)


def flows(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    states: Tensor,
    starts: Tensor | None,
    log_decay: Tensor,
    weight: Tensor | None,
    tiles: Tiles,
    of_tokens: Tensor,
    pairs: Tensor | None,
    *,
    scale: float,
    out: Tensor | None = None,
    sums: Sequence[Tensor] = (),
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A launch of paired_gradients.cu, early (q and k of 64) or (with `starts`) late.

    operands: q, k, v, do, or late k, q, do, v; states: (B, H, tiles.count, Dk, 64) fp32, contiguous, those that the
    pass begins with, and `starts` what the early pass began with; of_tokens, pairs: (B, H, N) fp32, heads apart by the
    same distance in all batch entries, where A and the pairs are written, or B; out: where dv is; sums: late, where the
    weight's gradient is wanted, and skip's, (B, H, N) fp32, contiguous, beside v's own. Returns <S, R> at each tile's
    start, late, and in which tiles something is not finite: (B, H, tiles.count).
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
    before = (
        *(x for operand in operands for x in operand_arguments(operand, heads, kept)),
        *(address_of(x) for x in (states, states if starts is None else starts)),
        *((bytes(MAP_BYTES), 0, 0, 0, 0) if out is None else (map_of(out), out.data_ptr(), *out.stride()[:3])),
        of_tokens.data_ptr(), of_tokens.stride(1), *((0, 0) if pairs is None else (pairs.data_ptr(), pairs.stride(1))),
        across.data_ptr(), lost.data_ptr(),
        *([x.data_ptr() for x in sums] + [0, 0])[:2], 0 if skip is None else skip.data_ptr(),
    )  # fmt: skip
    for name in launches.OUTPUTS if late else launches.OUTPUTS[:1]:
        place = place_of_tiles(tiles, log_decay, 1, FOUR, *operands[:2], weight=weight, kept=kept)
        launch = _kernel(name, operands[0].shape[3], late, weight is not None, states.device)
        launch((blocks,), GROUPS * launches.THREADS, *before, *place, *scales, again.data_ptr())
    return across, lost


def shared_memory(name: str, rows: int, late: bool, weighted: bool = False) -> int:
    """Bytes that a block asks for; how many chunks there are of each operand is as in the kernel."""
    heads = FOUR
    chunks = 2 * (2 * rows // 64 + 2 * heads) + (GROUPS if late else 0)
    sums = 0 if name == launches.AGAIN else 1 if late else 2
    own = sums * 4 * 64 * 4 + (4 if weighted else 2) * launches.SLOT + launches.TABLES["tile_outputs"][True]
    lost = 4 * (WIDTH + 4) if name == launches.AGAIN else 0
    return chunks * launches.BLOCK + heads * (own + lost) + 1024 + 64  # where blocks begin, and barriers


@cache
def _kernel(name: str, rows: int, late: bool, weighted: bool, device: torch.device) -> cuda_launch.Kernel:
    made = launches.defines(name, rows, WIDTH, GROUPS, torch.bfloat16, False, late, True) + shared.WEIGHTED * weighted
    return cuda_launch.kernel(
        "token_decay/cuda/paired_gradients.cu", "paired_gradients", device, made,
        shared_memory=shared_memory(name, rows, late, weighted), features="a",
    )  # fmt: skip
