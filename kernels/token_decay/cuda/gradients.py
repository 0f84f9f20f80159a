"""Launches of gradients.cu: all gradients of a decay a token from two passes over each tile, heads of 128 in bf16.

The gradient of log_decay is what leetdist.kernels.token_decay.triton.gradient says, its sums taken in other places: see
gradients.cu and leetdist.kernels.token_decay.triton.added_up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from leetdist.kernels.common.memory import address_of, empty_outputs
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import hopper, launches
from leetdist.kernels.constant_decay.cuda.operands import operand_arguments, tile_arguments
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.runtime.tensor_map import MAP_BYTES, map_of

SIZE, GROUPS = 128, 2  # of a head, and warpgroups that share it, beside that which fetches
AHEAD = 2  # chunks from the next one to the one that comes into the second cache; 0: none does
NAMES = ("gradients", "gradients again")  # the second for tiles with NaNs and infinities, as launches.AGAIN

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
) -> tuple[Tensor, dict[str, Tensor]]:
    """dq, in `out` if given, and what `late_gradients` is to be told.

    q, k, v, do: (B, H, N, 128) bf16; states: (B, H, tiles.count, 128, 128) fp32, contiguous (or zero_states), at the
    tiles' starts; log_decay: (B, H, N) fp32. What is kept, by name: "read" (B, H, 2, N) fp32, what each token's output
    reads from the state at its chunk's start times its gradient, in two sums; "early_lost" (B * H * tiles.count,),
    which tiles have something in them that is not finite.
    """
    batch, heads, tokens, _ = q.shape
    read = torch.empty(batch, heads, 2, tokens, dtype=torch.float32, device=q.device)
    lost = torch.empty(batch * heads * tiles.count, dtype=torch.int32, device=q.device)
    dq = place_of(do, k, log_decay, out)
    sums, scales = (states, read, read), (float(scale), float(scale), 1.0)
    _launch((q, k, v, do), sums, (dq, dq), log_decay, tiles, lost, scales, reverse=False)
    return placed(dq, out), {"read": read, "early_lost": lost}


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
    outs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and the gradient of log_decay (B, H, N) fp32, in `outs` where they are given.

    ends: the gradient of the state at each tile's end, as `states`; kept: what `early_gradients` has returned.
    """
    from leetdist.kernels.token_decay.triton.added_up import added_up

    batch, heads, tokens, _ = q.shape
    written = torch.empty(batch, heads, 2, tokens, dtype=torch.float32, device=q.device)
    across = torch.empty(batch, heads, tiles.count, dtype=torch.float32, device=q.device)
    lost = torch.empty(batch * heads * tiles.count, dtype=torch.int32, device=q.device)
    dk, dv = place_of(v, q, log_decay, outs[0]), place_of(k, do, log_decay, outs[1])
    scales = float(scale), 1.0, scale_of_added(float(scale), 1.0)
    _launch(
        (q, k, v, do), (ends, written, across), (dk, dv), log_decay, tiles, lost, scales, reverse=True, starts=states
    )
    grad = added_up(
        q, k, v, do, states, ends, log_decay, tiles, kept["read"], written, across, (kept["early_lost"], lost),
        scale=scale, out=outs[2],
    )  # fmt: skip
    return placed(dk, outs[0]), placed(dv, outs[1]), grad


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
    share: int = 1,
) -> None:
    """See leetdist.kernels.constant_decay.cuda.hopper.compile_for."""
    for name in NAMES:
        _kernel(name, step == "late_gradients", device)


def _launch(
    operands: tuple[Tensor, ...],
    sums: tuple[Tensor, Tensor, Tensor],
    outs: tuple[Tensor, Tensor],
    log_decay: Tensor,
    tiles: Tiles,
    lost: Tensor,
    scales: tuple[float, float, float],
    *,
    reverse: bool,
    starts: Tensor | None = None,
) -> None:
    """sums: the states that the pass begins with, and where it writes its sums of tokens and of tiles."""
    if not lost.numel() or not operands[0].shape[2]:
        return
    heads, kept = log_decay.shape[1], []  # type: ignore[var-annotated]
    begin, of_tokens, across = sums
    arguments: list[Any] = [x for operand in operands for x in operand_arguments(operand, heads, kept)]
    arguments += [address_of(x) for x in (begin, begin if starts is None else starts)]
    for out in outs:
        arguments += [map_of(out) or bytes(MAP_BYTES), out.data_ptr(), *out.stride()[:3]]
    arguments += [of_tokens.data_ptr(), across.data_ptr(), *tile_arguments(tiles, log_decay, 1, *operands)]
    for name in NAMES:
        launch = _kernel(name, reverse, begin.device)
        launch((lost.numel(),), (GROUPS + 1) * launches.THREADS, *arguments, *scales, lost.data_ptr())


def place_of(like: Tensor, other: Tensor, log_decay: Tensor, out: Tensor | None) -> Tensor:
    """Where a gradient is written: in `out`, where the copy engine can."""
    if out is None:
        return empty_outputs(like, other, log_decay, like.dtype)
    return out if map_of(out) is not None else torch.empty_like(out, memory_format=torch.contiguous_format)


def placed(grad: Tensor, out: Tensor | None) -> Tensor:
    """The gradient, in `out` if that is given."""
    return grad if out is None or grad is out else out.copy_(grad)


def shared_memory(name: str, reverse: bool) -> int:
    """Bytes that a block asks for: two chunks of four operands, the state twice in 16 bits; late also the scores that a
    warpgroup hands the other, and what sums them."""
    blocks = 2 * 4 * SIZE // 64 + 2 * 4 + (3 if reverse else 0)
    tables = GROUPS * launches.TABLES["tile_outputs"][True] + 2 * launches.SLOT + (4 * 64 * 4 if reverse else 0)
    lost = GROUPS * 4 * (SIZE + 4) if name == NAMES[1] else 0
    return blocks * launches.BLOCK + tables + lost + launches.BARRIERS


def defines(name: str, reverse: bool) -> tuple[tuple[str, int], ...]:
    """What a kernel is compiled with."""
    again = launches.AGAIN if name == NAMES[1] else name
    return *launches.defines(again, SIZE, 64, GROUPS, torch.bfloat16, False, reverse, True), ("AHEAD", AHEAD)


@cache
def _kernel(name: str, reverse: bool, device: torch.device) -> cuda_launch.Kernel:
    return cuda_launch.kernel(
        "token_decay/cuda/gradients.cu", "gradients", device, defines(name, reverse),
        shared_memory=shared_memory(name, reverse), features="a",
    )  # fmt: skip
