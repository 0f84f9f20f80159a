"""Moving tokens between ranks: shard, gather, and the realignment of packed documents. All differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.arguments import as_int, check_plain
from leetdist.sequence.agreement import agree
from leetdist.sequence.grid import default_tile, even_tile, shard_lengths
from leetdist.sequence.group import resolve, untraced, warn_where_unjoined
from leetdist.sequence.once import check_not_transformed, differentiated_once
from leetdist.sequence.site import warn
from leetdist.sequence.transport import Message, Transport

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

# The fullest rank's tokens over the mean, beyond which shards are worth a warning.
UNEVEN = 1.5


def shard_sequence(x: Tensor, dim: int, group: Group | None, *, tile: int | None = None) -> Tensor:
    """This rank's shard of `x` along `dim`: consecutive, in rank order, boundaries on the tile grid.

    Ranks get whole tiles, as evenly as they divide, so shards may differ by a tile, and a rank gets none where there
    are fewer tiles than ranks. Differentiable: the gradient of `x` on each rank is that of its own shard and zero
    elsewhere, so that, as for every replicated tensor, the ranks' gradients add up to the whole one.

    Args:
        x: any shape and dtype, the same on every rank; N tokens along `dim`.
        dim: the token dimension, negative counts from the end.
        group: ProcessGroup, 1-D DeviceMesh or virtual group; None takes the surrounding `sequence_parallel`, and
            without one returns `x`.
        tile: tile length in tokens, if `linear_attention` will be called with one.

    Returns:
        (..., N_local, ...), a view of `x`.

    Raises:
        ValueError: `x` is no dense tensor, `dim` is out of range, `tile` is not positive, or `group` is no group of
            this rank. That the ranks' `x` are equally long is checked by the next call that sends messages.

    Source: the contiguous sharding of LASP, arXiv 2404.02882, section 3, with uneven shards.

    >>> import torch, leetdist
    >>> x = torch.arange(1000.)
    >>> leetdist.virtual_ranks(lambda group: leetdist.shard_sequence(x, 0, group).shape[0], ranks=3)
    [256, 384, 360]
    """
    transport = resolve(group)
    dim = dimension("x", x, dim)
    if tile is not None:
        tile = as_int("tile", tile, "a positive number of tokens, or None")
        if tile < 1:
            raise ValueError(f"tile must be a positive number of tokens, or None, got {tile}")
    if transport is None:
        warn_where_unjoined()
        return x
    tokens = x.shape[dim]
    tile = tile or default_tile(tokens)
    lengths = shard_lengths(tokens, transport.size, tile)
    uneven = 0 in lengths or max(lengths) * transport.size > UNEVEN * tokens
    if uneven and tokens and transport.rank == 0:
        _warn_of_idle_ranks(lengths, tile)
    return cut(x, dim, lengths, transport)


def cut(x: Tensor, dim: int, lengths: tuple[int, ...], transport: Transport) -> Tensor:
    """This rank's shard of `x`, where the ranks hold `lengths` of its tokens."""
    transport.note_cut(lengths[transport.rank], sum(lengths))
    return x.narrow(dim, sum(lengths[: transport.rank]), lengths[transport.rank])


def _warn_of_idle_ranks(lengths: tuple[int, ...], tile: int) -> None:
    """Once for each text, as all warnings; nobody computes faster than the rank with the most tokens."""
    tokens, ranks, idle = sum(lengths), len(lengths), lengths.count(0)
    better = even_tile(tokens, ranks)
    advice = "share it among fewer ranks"
    if better is not None and better < tile:
        advice += f", or pass tile={better} to shard_sequence and linear_attention (another order of sums)"
    warn(
        f"leetdist: {tokens:,} tokens on {ranks} ranks in tiles of {tile:,}: the fullest rank holds {max(lengths):,}, "
        f"{f'{idle} of them none' if idle else f'the emptiest {min(lengths):,}'}; {advice}"
    )


def gather_sequence(x_local: Tensor, dim: int, group: Group | None) -> Tensor:
    """The whole sequence on every rank, from the ranks' shards along `dim`; the inverse of `shard_sequence`.

    Differentiable: what flows into the whole sequence on several ranks is summed, in rank order, into the shard that
    the tokens came from.

    Args:
        x_local: (..., N_local, ...), this rank's shard; shapes may differ along `dim` only, also be empty.
        dim: the token dimension, negative counts from the end.
        group: as for `shard_sequence`.

    Returns:
        (..., N, ...) with the dtype and device of `x_local`.

    Raises:
        ValueError: `x_local` is no dense tensor, `dim` is out of range, or the ranks disagree on `dim`, the other
            dimensions, the dtype, whether a gradient is recorded, or the length of the sequence that was cut.
        RuntimeError: a rank does not answer.

    Source: as `shard_sequence`.

    >>> import torch, leetdist
    >>> x = torch.arange(100.)
    >>> def there_and_back(group):
    ...     return leetdist.gather_sequence(leetdist.shard_sequence(x, 0, group), 0, group)
    >>> all(torch.equal(x, y) for y in leetdist.virtual_ranks(there_and_back, ranks=3))
    True
    """
    transport = resolve(group)
    mine: Any
    try:
        dim = dimension("x_local", x_local, dim)
        shape = list(x_local.shape)
        tokens = shape.pop(dim)
        recorded = torch.is_grad_enabled() and x_local.requires_grad
        cut_from = None if transport is None else transport.cut_from(tokens)
        mine = (tokens, tuple(shape), str(x_local.dtype), cut_from, recorded, dim)
    except ValueError as error:
        if transport is None:
            raise
        mine = error  # the others must not wait for this rank
    if transport is None:
        return x_local
    everyone = agree(mine, transport, "the shapes to gather").everyone
    check_cut([theirs[3] for theirs in everyone])
    for rank, theirs in enumerate(everyone):
        if (*theirs[1:3], theirs[5]) != (*everyone[0][1:3], everyone[0][5]):
            raise ValueError(
                f"gather_sequence: rank {rank} has {theirs[2]} of shape {theirs[1]} beside dim {theirs[5]}, "
                f"rank 0 has {everyone[0][2]} of shape {everyone[0][1]} beside dim {everyone[0][5]}"
            )
        if theirs[4] != everyone[0][4]:  # those that have a backward pass would wait for the others
            raise ValueError(
                f"gather_sequence: rank {rank} has requires_grad {theirs[4]}, rank 0 has {everyone[0][4]}; a tensor "
                "that is only looked at is detached first"
            )
    lengths = tuple(theirs[0] for theirs in everyone)
    check_not_transformed("gather_sequence over ranks", x_local)
    whole: Tensor = _Gather.apply(x_local, dim, lengths, transport)
    return whole


def redistribute(x: Tensor, dim: int, old: tuple[int, ...], new: tuple[int, ...], transport: Transport) -> Tensor:
    """Tokens of `x` moved so that the ranks hold `new` instead of `old` numbers of them; differentiable."""
    moved: Tensor = x if old == new else _Redistribute.apply(x, dim, old, new, transport)
    return moved


def check_cut(lengths: Sequence[int | None]) -> None:
    """Shards are of one sequence: `lengths` of those that shard_sequence cut on each rank, None where it did not."""
    known = sorted({length for length in lengths if length is not None})
    if len(known) > 1:
        raise ValueError(
            f"x: shard_sequence takes the same x on every rank, got {' and '.join(map(str, known))} tokens on ranks of "
            f"one group"
        )


def dimension(name: str, x: Tensor, dim: int) -> int:
    """dim, counted from the front; ValueError where x has no such dimension."""
    check_plain(name, x)
    dim = as_int("dim", dim)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be in [{-x.ndim}, {x.ndim}) for a tensor of shape {tuple(x.shape)}, got {dim}")
    return int(dim % x.ndim)


def _resized(x: Tensor, dim: int, tokens: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = tokens
    return x.new_empty(shape)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, lengths: tuple[int, ...], transport: Transport) -> Tensor:
        ctx.dim, ctx.lengths, ctx.transport = dim, lengths, transport
        whole = _resized(x, dim, sum(lengths))
        parts = whole.split(lengths, dim)
        parts[transport.rank].copy_(x)
        swap(
            [(x, rank) for rank in transport.others()],
            [(parts[rank], rank) for rank in transport.others()],
            transport, "a shard to gather",
        )  # fmt: skip
        return whole

    @staticmethod
    @differentiated_once("gather_sequence")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        transport, parts = ctx.transport, grad.split(ctx.lengths, ctx.dim)
        mine = parts[transport.rank]
        theirs = {rank: torch.empty_like(mine, memory_format=torch.contiguous_format) for rank in transport.others()}
        swap(
            [(parts[rank], rank) for rank in transport.others()],
            [(part, rank) for rank, part in theirs.items()],
            transport, "a gradient of the gathered sequence",
        )  # fmt: skip
        total = torch.zeros_like(mine, memory_format=torch.contiguous_format)
        for rank in range(transport.size):
            total += theirs.get(rank, mine)
        return total, None, None, None


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, old: tuple[int, ...], new: tuple[int, ...], transport: Transport
    ) -> Tensor:
        ctx.back = (dim, new, old, transport)
        return move(x, dim, old, new, transport)

    @staticmethod
    @differentiated_once("redistribute")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return move(grad, *ctx.back), None, None, None, None


def move(x: Tensor, dim: int, old: tuple[int, ...], new: tuple[int, ...], transport: Transport) -> Tensor:
    """`redistribute` without a gradient."""
    if old == new:
        return x
    me = transport.rank
    before, after = (tuple(accumulate(lengths, initial=0)) for lengths in (old, new))
    moved = _resized(x, dim, new[me])

    def common(source: int, to: int) -> tuple[int, int]:
        first = max(before[source], after[to])
        return first, min(before[source + 1], after[to + 1]) - first

    def there(to: int) -> Tensor:
        first, count = common(me, to)
        return x.narrow(dim, first - before[me], count) if count > 0 else x.narrow(dim, 0, 0)

    def here(source: int) -> Tensor:
        first, count = common(source, me)
        return moved.narrow(dim, first - after[me], count) if count > 0 else moved.narrow(dim, 0, 0)

    here(me).copy_(there(me))
    swap(
        [(there(rank), rank) for rank in transport.others()],
        [(here(rank), rank) for rank in transport.others()],
        transport, "tokens that realign packed documents",
    )  # fmt: skip
    return moved


@untraced
def swap(outgoing: list[Message], incoming: list[Message], transport: Transport, what: str) -> None:
    """One exchange; the tensors without elements take no message."""
    with transport.call("exchange"):
        transport.exchange(
            [(x, rank) for x, rank in outgoing if x.numel()], [(x, rank) for x, rank in incoming if x.numel()], what
        )
        transport.flush()
