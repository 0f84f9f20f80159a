"""Launches for heads that share operands, which a block then reads once for several heads.

States (shared_states.cu) and outputs (paired_outputs.cu) have the bits that each head has by itself. Outputs that are
wanted for their sum over heads alone, as gradients of what heads share are, are added up by a block (two heads in
summed_outputs.cu, four in grouped_outputs.cu), or by two of them (eight).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from leetdist.kernels.common.memory import empty_outputs, empty_states, heads_of
from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.cuda import launches
from leetdist.kernels.constant_decay.cuda.operands import operand_arguments, tile_arguments
from leetdist.kernels.constant_decay.pytorch.block import scale_of_added
from leetdist.kernels.runtime import cuda_launch
from leetdist.kernels.runtime.tensor_map import map_of

HEADS = 2  # of a warpgroup
WIDTH = 64  # columns, or rows, of a head's state, of which two are as large as one of 128
FOUR = 4  # heads of a block
GROUPS = {"grouped_outputs": 2, "shared_states": 4}  # warpgroups of a block, if more than one
GROUPED_COLUMNS = 128  # of grouped_outputs.cu
WEIGHTED = (("WEIGHTED", 1),)  # what a kernel is compiled with that multiplies v by its weights
SKIPPED = (("SKIPPED", 1),)  # and what paired_outputs.cu is that adds to the outputs what it is `skip`ped by
FLOWS = (("FLOWS", 1),)  # and grouped_outputs.cu that leaves what the gradient of log_decay is a sum of
Flows = tuple[Tensor, Tensor, Tensor, Tensor]


def in_pairs(a: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles, *, weighted: bool = False) -> bool:
    """Whether heads come in pairs that share a and b, and every multiprocessor has some. weighted: no matter whether
    all have, for a product written to memory would take longer."""
    heads = heads_of(log_decay)
    programs = c.shape[0] * heads * tiles.count
    return _together(HEADS, a.shape[3], c.shape[3], programs, c.device, weighted) and not any(
        heads // x.shape[1] % HEADS for x in (a, b)
    )


def in_fours(b: Tensor, c: Tensor, log_decay: Tensor, tiles: Tiles, *, weighted: bool = False) -> bool:
    """Whether heads come in fours that share b, and every multiprocessor has some. weighted: as of `in_pairs`."""
    heads = heads_of(log_decay)
    programs = c.shape[0] * heads * tiles.count
    return _together(FOUR, b.shape[3], c.shape[3], programs, c.device, weighted) and heads // b.shape[1] % FOUR == 0


def _together(heads: int, rows: int, columns: int, programs: int, device: torch.device, weighted: bool) -> bool:
    fits = rows in (64, 128) and columns == WIDTH
    return fits and (weighted or programs // heads > cuda_launch.multiprocessors(device))


def shared_states(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float,
    to_end: bool,
    out: Tensor | None,
    weight: Tensor | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_states. weight: of c's tokens."""
    if out is None:
        out = empty_states(b, c, log_decay, tiles)
    if not out.numel():
        return out
    heads = heads_of(log_decay)
    kept: list[Tensor] = []
    kind = b.dtype, False, reverse, weight is not None, 1
    launch = _kernel("shared_states", "tile_states", b.shape[3], c.shape[3], *kind, b.device)
    launch(
        (b.shape[0] * heads // FOUR * tiles.count,), FOUR * launches.THREADS,
        *operand_arguments(b, heads, kept), *operand_arguments(c, heads, kept), out.data_ptr(),
        *place_of_tiles(tiles, log_decay, 1, FOUR, b, weight=weight, kept=kept), tiles.unread(reverse, to_end),
        float(scale),
    )  # fmt: skip
    return out


def paired_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float,
    state_scale: float,
    out_dtype: torch.dtype,
    out: Tensor | None,
    weight: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """See leetdist.kernels.constant_decay.pytorch.block.tile_outputs; out_dtype: a's; weight: of c's tokens; skip: (H,)
    or (H, Dc), that times c without its weights is added to the outputs."""
    if out is None:
        out = empty_outputs(a, c, log_decay, out_dtype)
    if not out.numel():
        return out
    target = out
    if map_of(out) is None:
        target = torch.empty_like(out, memory_format=torch.contiguous_format)
    place = map_of(target)
    assert place is not None
    places: tuple[bytes | int, ...] = (place, target.data_ptr(), *target.stride()[:3])
    options = {"reverse": reverse, "scale": scale, "state_scale": state_scale}
    _outputs(
        "paired_outputs", a, b, c, states, places, log_decay, tiles, c.shape[3], 1, heads=HEADS, cluster=1, wide=False,
        weight=weight, skip=skip, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    if target is not out:
        out.copy_(target)
    return out


def summed(a: Tensor, c: Tensor, log_decay: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether outputs are wanted for their sum over heads, and can be added up."""
    return (
        out_dtype == torch.float32
        and a.dtype == torch.bfloat16
        and a.shape[3] == WIDTH
        and c.shape[3] % WIDTH == 0
        and heads_of(log_decay) // c.shape[1] % HEADS == 0
    )


def added_up(share: int, columns: int) -> tuple[int, int]:
    """How many heads of `share` with so many columns one block adds up, and how many blocks then do: the association
    of a sum, which depends on nothing else."""
    if share % FOUR or columns != GROUPED_COLUMNS:
        return HEADS, 1
    return FOUR, 2 if share % (2 * FOUR) == 0 else 1


def summed_outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    *,
    reverse: bool,
    scale: float,
    state_scale: float,
    out: Tensor | None,
    weight: Tensor | None = None,
    flows: Flows | None = None,
) -> Tensor:
    """Those of leetdist.kernels.constant_decay.pytorch.block.tile_outputs added up over n heads: in a's dtype,
    (B, H / n, N, Dc), where that is all that share one of c's, and in fp32 where some are still to be added up. In
    `out`, which an earlier call has returned, if given. weight: of b's tokens; reversed, of a's.

    flows, of dq with GROUPED_COLUMNS and fours of heads: q, and where to leave what the gradient of log_decay is a sum
    of: A and pairs, (B, H, N) fp32, heads apart by the same distance in all batch entries, and which tiles' states are
    not finite, (B, H, tiles.count) int32."""
    share = heads_of(log_decay) // c.shape[1]
    heads, cluster = added_up(share, c.shape[3])
    together = heads * cluster
    if out is None:
        out = empty_outputs(a, c, log_decay[:, ::together], a.dtype if together == share > HEADS else torch.float32)
    if not out.numel():
        if flows is not None:
            flows[-1].zero_()
        return out
    places = out.data_ptr(), *out.stride()[:3]
    programs = a.shape[0] * heads_of(log_decay) // heads * tiles.count
    columns, splits = c.shape[3] // 2, 1
    if heads == HEADS:
        columns, _, splits = launches.shares(programs, a.shape[3], c.shape[3], cuda_launch.multiprocessors(c.device))
    source = "summed_outputs" if heads == HEADS else "grouped_outputs"
    options = {"reverse": reverse, "scale": scale, "state_scale": state_scale, "wide": out.dtype == torch.float32}
    _outputs(
        source, a, b, c, states, places, log_decay, tiles, columns, splits, heads=heads, cluster=cluster,
        weight=weight, flows=flows, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return out


def _outputs(
    source: str,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    places: tuple[bytes | int, ...],
    log_decay: Tensor,
    tiles: Tiles,
    columns: int,
    splits: int,
    *,
    heads: int,
    cluster: int,
    weight: Tensor | None,
    skip: Tensor | None = None,
    flows: Flows | None = None,
    wide: int,
    reverse: bool,
    scale: float,
    state_scale: float,
) -> None:
    """Launch a kernel of outputs, and its second walk, with so many heads a block; places: where the outputs go, as it
    takes them."""
    all_heads = heads_of(log_decay)
    kept: list[Tensor] = []
    programs = a.shape[0] * all_heads // heads * tiles.count
    again = torch.empty(programs * splits, dtype=torch.int32, device=a.device)  # written by every block
    sharing = (a, b) if source == "paired_outputs" else (c,)
    arguments = (
        *(x for operand in (a, b, c) for x in operand_arguments(operand, all_heads, kept)),
        states.data_ptr(), *states.stride(), *places,
        *place_of_tiles(tiles, log_decay, splits, heads, *sharing, weight=weight, kept=kept),
        float(scale), float(state_scale), scale_of_added(float(scale), float(state_scale)), again.data_ptr(),
        *(() if skip is None else (skip.data_ptr(), *skip.stride(), 0)[:3]),
    )  # fmt: skip
    left: tuple[bytes | int, ...] = ()
    if flows is not None:
        q, read, pairs, lost = flows
        left = (
            *operand_arguments(q, all_heads, kept),
            read.data_ptr(), read.stride(1), pairs.data_ptr(), pairs.stride(1), lost.data_ptr(),
        )  # fmt: skip
    for name in launches.OUTPUTS:
        kind = a.dtype, wide, reverse, weight is not None, cluster
        more = () if name == launches.AGAIN else left
        launch = _kernel(
            source, name, a.shape[3], columns, *kind, a.device, skipped=skip is not None, flows=len(more) > 0
        )
        launch((programs * splits,), launches.THREADS * GROUPS.get(source, 1), *arguments, *more)


def place_of_tiles(
    tiles: Tiles,
    log_decay: Tensor,
    splits: int,
    heads: int,
    *sharing: Tensor,
    weight: Tensor | None,
    kept: list[Tensor],
) -> tuple[int, ...]:
    """Where the tiles are, of so many heads at a time, and the weights, if any. Heads that share these operands come
    one after the other, tile by tile, in consecutive blocks, which a cluster is made of."""
    *place, _ = tile_arguments(tiles, log_decay, splits, *sharing)
    place[2] //= heads
    found = *place, heads_of(log_decay) // max(x.shape[1] for x in sharing) // heads
    if weight is None:
        return found
    if weight.stride() != log_decay.stride():
        weight = torch.empty_strided(log_decay.shape, log_decay.stride(), device=weight.device).copy_(weight)
        kept.append(weight)
    return *found, weight.data_ptr()


def compile_for(
    step: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    wide: int,
    reverse: bool,
    programs: int,
    device: torch.device,
    share: int,
    *,
    weighted: bool = False,
    flows: bool = False,
) -> None:
    """As leetdist.kernels.constant_decay.cuda.hopper.compile_for; share: how many heads share an operand at most."""
    if share % HEADS or columns % WIDTH:
        return
    if step == "tile_states":
        if share % FOUR == 0 and _together(FOUR, rows, columns, programs, device, weighted):
            _kernel("shared_states", step, rows, columns, dtype, False, reverse, weighted, 1, device)
        return
    heads, cluster = added_up(share, columns)
    held, _, _ = launches.shares(programs // HEADS, rows, columns, cuda_launch.multiprocessors(device))
    for name in launches.OUTPUTS:
        if wide and rows == WIDTH and dtype == torch.bfloat16 and heads == FOUR:
            kind = dtype, share != heads * cluster, reverse, weighted, cluster
            flowing = flows and name != launches.AGAIN
            _kernel("grouped_outputs", name, rows, columns // 2, *kind, device, flows=flowing)
        elif wide and rows == WIDTH and dtype == torch.bfloat16:
            _kernel("summed_outputs", name, rows, held, dtype, True, reverse, weighted, 1, device)
        elif not wide and _together(HEADS, rows, columns, programs, device, weighted):
            _kernel("paired_outputs", name, rows, columns, dtype, False, reverse, weighted, 1, device)


def compile_skipped(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """As `compile_for`, of outputs that are `skip`ped by something."""
    for name in launches.OUTPUTS:
        _kernel("paired_outputs", name, rows, columns, dtype, False, False, True, 1, device, skipped=True)


def shared_memory(
    source: str, name: str, rows: int, columns: int, weighted: bool = False, skipped: bool = False
) -> int:
    """Bytes that a block asks for; how many chunks there are of each operand is as in the kernels."""
    heads = HEADS if source in ("paired_outputs", "summed_outputs") else FOUR
    if source == "shared_states":
        operands, slots, tables = 4 * (rows + heads * columns), 4, launches.TABLES["tile_states"][True]
    elif (
        source == "grouped_outputs"
    ):  # of 128 columns; with two warpgroups' scores, and two places of what each is sent
        operands, slots = 2 * (heads * 2 * rows + 2 * columns) + 2 * 64 + 2 * 2 * 64, 2
        tables = launches.TABLES["tile_outputs"][True]
    else:
        own, common = (2 * rows, columns) if source == "summed_outputs" else (columns, 2 * rows)
        operands, slots = 2 * (heads * own + common) + 64, 2  # and scores
        tables = launches.TABLES["tile_outputs"][True]
    lost = 4 * (columns + 4) if name == launches.AGAIN else 0
    slots *= 2 if weighted else 1
    own = tables + slots * launches.SLOT + lost + 4 * columns * skipped
    return operands // 64 * launches.BLOCK + launches.BARRIERS + heads * own


@cache
def _kernel(
    source: str,
    name: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    wide: int,
    reverse: bool,
    weighted: bool,
    cluster: int,
    device: torch.device,
    *,
    skipped: bool = False,
    flows: bool = False,
) -> cuda_launch.Kernel:
    made = launches.defines(name, rows, columns, GROUPS.get(source, 1), dtype, wide, reverse, True)
    made += WEIGHTED * weighted + SKIPPED * skipped + (("CLUSTER", cluster),) * (source == "grouped_outputs")
    made += FLOWS * flows
    return cuda_launch.kernel(
        f"token_decay/cuda/{source}.cu", source, device, made,
        shared_memory=shared_memory(source, name, rows, columns, weighted, skipped), features="a",
    )  # fmt: skip
