"""The tokens around a shard: what a convolution, or a comparison of neighbours, needs of other ranks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from leetdist.arguments import as_int, check_plain
from leetdist.sequence.agreement import agree
from leetdist.sequence.documents import check_end, check_offsets, known_offsets
from leetdist.sequence.group import resolve
from leetdist.sequence.once import check_not_transformed, differentiated_once
from leetdist.sequence.shard import check_cut, dimension, swap
from leetdist.sequence.transport import Transport

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

Span: TypeAlias = "tuple[int, int]"  # tokens of the whole sequence, from and up to


def halo(
    x_local: Tensor,
    dim: int,
    group: Group | None,
    *,
    width: int,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The last `width` tokens before this rank's shard, from the ranks that hold them: zeros before the sequence.

    Where the rank to the left holds fewer, they come from further left. Differentiable: what flows into a token's
    copies is summed, in rank order, on the rank that holds it.

    Args:
        x_local: (..., N_local, ...), this rank's shard, any dtype; shapes may differ along `dim` only, also be empty.
        dim: the token dimension, negative counts from the end.
        group: ProcessGroup, 1-D DeviceMesh or virtual group; None takes the surrounding `sequence_parallel`, and
            without one the whole sequence is here.
        width: how many tokens, at least 0.
        initial: (..., width, ...), what comes before the sequence, on the first rank only; None is zeros.
        cu_seqlens: (documents + 1,) int32 or int64, offsets of packed documents in the whole sequence: what lies
            before the document of this shard's first token is zero then.

    Returns:
        (..., width, ...) with the dtype and device of `x_local`.

    Raises:
        ValueError: an argument is wrong, or the ranks disagree; every rank of the group raises.
        RuntimeError: a rank does not answer.

    Source: the exchange of boundary cells in domain decomposition, for a causal stencil.

    >>> import torch, leetdist
    >>> x = torch.arange(1., 101.)
    >>> def before(group):
    ...     return leetdist.halo(leetdist.shard_sequence(x, 0, group, tile=16), 0, group, width=3).tolist()
    >>> leetdist.virtual_ranks(before, ranks=3)
    [[0.0, 0.0, 0.0], [30.0, 31.0, 32.0], [62.0, 63.0, 64.0]]
    """
    transport = resolve(group)
    facts: dict[str, Hashable] | ValueError
    try:
        dim = dimension("x_local", x_local, dim)
        width = as_int("width", width, "a number of tokens of at least 0")
        if width < 0:
            raise ValueError(f"width must be a number of tokens of at least 0, got {width}")
        wanted = resized_shape(x_local, dim, width)
        if initial is not None:
            check_initial(initial, wanted, x_local, transport)
            recorded = torch.is_grad_enabled() and initial.requires_grad
            if transport is not None and recorded and not x_local.requires_grad:
                raise ValueError("initial needs a gradient, so x_local must, on every rank: all have a backward then")
        if cu_seqlens is not None:
            check_offsets(cu_seqlens, x_local)
            if initial is not None:
                raise ValueError("initial must be None with cu_seqlens: each document starts from zeros")
        facts = {
            "dim": dim,
            "width": width,
            "shape": tuple(resized_shape(x_local, dim, 0)),
            "dtype": x_local.dtype,
            "requires_grad": torch.is_grad_enabled() and x_local.requires_grad,
            "cu_seqlens": known_offsets(cu_seqlens),
        }
    except ValueError as error:
        if transport is None:
            raise
        facts = error
    if transport is None:
        check_end(cu_seqlens, (x_local.shape[dim],))
        return x_local.new_zeros(wanted) if initial is None else initial
    tokens = 0 if isinstance(facts, ValueError) else x_local.shape[dim]
    lengths = agreed_lengths("halo", tokens, facts, transport)
    check_end(cu_seqlens, lengths)
    return before_shard(x_local, dim, width, lengths, transport, initial=initial, cu_seqlens=cu_seqlens)


def before_shard(
    x: Tensor,
    dim: int,
    width: int,
    lengths: tuple[int, ...],
    transport: Transport,
    *,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`halo`, once all is checked; `lengths` are the ranks' numbers of tokens."""
    offsets = (0, *accumulate(lengths))
    if transport.rank == 0:  # what comes before the sequence is the first rank's too
        start = x.new_zeros(resized_shape(x, dim, width)) if initial is None else initial
        x = torch.cat((start, x), dim)
    held = (lengths[0] + width, *lengths[1:])
    found = tokens_of(x, dim, held, [(offset, offset + width) for offset in offsets[:-1]], transport)
    if cu_seqlens is None:
        return found
    begin = offsets[transport.rank]
    # On the device, because reading a GPU's offsets would stop its stream.
    cu_seqlens = cu_seqlens.to(x.device)
    document = torch.searchsorted(cu_seqlens, torch.full((1,), begin, device=x.device), right=True) - 1
    inside = torch.arange(begin - width, begin, device=x.device) >= cu_seqlens[document]
    return torch.where(inside.view(-1, *[1] * (x.ndim - 1 - dim)), found, found.new_zeros(()))


def tokens_of(x: Tensor, dim: int, lengths: tuple[int, ...], spans: Sequence[Span], transport: Transport) -> Tensor:
    """This rank's of the `spans`, one a rank, of the sequence of which the ranks hold `lengths`; zeros outside of it.
    Differentiable: what flows into copies of a token is summed in rank order."""
    check_not_transformed("an exchange of tokens between ranks", x)
    found: Tensor = _TokensOf.apply(x, dim, lengths, tuple(spans), transport)
    return found


class _TokensOf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, lengths: tuple[int, ...], spans: tuple[Span, ...], transport: Transport
    ) -> Tensor:
        ctx.asked = dim, lengths, spans, transport
        me = transport.rank
        found = x.new_zeros(resized_shape(x, dim, spans[me][1] - spans[me][0]))
        parts = _parts(found, dim, lengths, spans, me)
        asked = _asked(x, dim, lengths, spans, me)
        parts[me].copy_(asked[me])
        swap(
            [(asked[rank], rank) for rank in transport.others()],
            [(parts[rank], rank) for rank in transport.others()],
            transport, "tokens beside its shard",
        )  # fmt: skip
        return found

    @staticmethod
    @differentiated_once("halo")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, lengths, spans, transport = ctx.asked
        me = transport.rank
        total = grad.new_zeros(resized_shape(grad, dim, lengths[me]))
        places = _asked(total, dim, lengths, spans, me)
        parts = _parts(grad, dim, lengths, spans, me)
        theirs = [torch.empty_like(place, memory_format=torch.contiguous_format) for place in places]
        theirs[me].copy_(parts[me])
        swap(
            [(parts[rank], rank) for rank in transport.others()],
            [(theirs[rank], rank) for rank in transport.others()],
            transport, "gradients of tokens beside a shard",
        )  # fmt: skip
        for place, part in zip(places, theirs, strict=True):
            place += part
        return total, None, None, None, None


def _asked(x: Tensor, dim: int, lengths: tuple[int, ...], spans: Sequence[Span], me: int) -> list[Tensor]:
    """What of this rank's tokens each rank asks for."""
    offset = sum(lengths[:me])
    return [_within(x, dim, (offset, offset + lengths[me]), span, offset) for span in spans]


def _parts(x: Tensor, dim: int, lengths: tuple[int, ...], spans: Sequence[Span], me: int) -> list[Tensor]:
    """The parts of this rank's span that each rank holds."""
    held = pairwise((0, *accumulate(lengths)))
    return [_within(x, dim, theirs, spans[me], spans[me][0]) for theirs in held]


def _within(x: Tensor, dim: int, a: Span, b: Span, first: int) -> Tensor:
    """The tokens of both spans in x, which begins at token `first`."""
    begin, end = max(a[0], b[0]), min(a[1], b[1])
    return x.narrow(dim, begin - first, end - begin) if begin < end else x.narrow(dim, 0, 0)


def agreed_lengths(
    call: str, tokens: int, facts: Mapping[str, Hashable] | ValueError, transport: Transport
) -> tuple[int, ...]:
    """Tokens on each rank, once all are known to make the same `call`, with the same `facts` by name; a ValueError
    instead of facts is raised, here and, told of, on the other ranks."""
    mine: Any = facts
    if not isinstance(facts, ValueError):
        mine = (call, tokens, transport.cut_from(tokens), tuple(facts.items()))
    everyone = agree(mine, transport, f"the arguments of {call}").everyone
    for rank, theirs in enumerate(everyone):
        for (name, value), (_, first) in zip(theirs[3], everyone[0][3], strict=True):
            if value != first:
                raise ValueError(f"{call}: rank {rank} has {name} {value}, rank 0 has {first}")
    check_cut([theirs[2] for theirs in everyone])
    return tuple(theirs[1] for theirs in everyone)


def check_initial(initial: Tensor, shape: list[int], like: Tensor, transport: Transport | None) -> None:
    """What comes before the sequence."""
    check_plain("initial", initial, "a tensor or None")
    if transport is not None and transport.rank > 0:
        raise ValueError(f"initial is given on the first rank of the group only, got one on rank {transport.rank}")
    if list(initial.shape) != shape or initial.dtype != like.dtype or initial.device != like.device:
        raise ValueError(
            f"initial must be {like.dtype} of shape {tuple(shape)} on {like.device}, got {initial.dtype} of shape "
            f"{tuple(initial.shape)} on {initial.device}"
        )


def resized_shape(x: Tensor, dim: int, tokens: int) -> list[int]:
    """x's shape with so many tokens."""
    return [*x.shape[:dim], tokens, *x.shape[dim + 1 :]]


__all__ = ["halo"]
