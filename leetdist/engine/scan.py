"""The scan over ranks: the left fold over all tiles of a sequence, in the one order that the contract fixes.

A rank folds its own tiles onto the state that arrives from the rank before it (in the direction of the walk) and hands
the result on. `S_p = gamma^L S_{p-1} + S_local` would need no fold per hop, but associates the sum differently, and so
gives other bits than one device. What travels is one state a sequence: (B, H, Dk, Dv) fp32, whatever the length.

Heads go in lanes (`engine.lanes.Lane`), each with a chain of its own, so that the hops of one overlap with the work of
another. A head's numbers never meet another head's, so the lanes change no bit.

Heads that forget. Let `gamma^T`, the factor with which a full tile takes over the state before it, be exactly 0 (in the
dtype of the states, as the fold rounds it). The fold over a tile is then `0 * S + L`, which is L for every finite S (up
to the sign of a zero). So where the first tile that a rank walks is full:

- what the rank hands on does not depend on what arrives: such a lane (`forgets`) hands on first and receives later, and
  its chain is one hop long whatever the number of ranks;
- only that tile's own start state is what arrives, so it is put there when it comes, without another fold.

The state still has to travel that one hop, because the outputs of the tile it reaches read it with gamma^1 to gamma^T.
Where even gamma^1 is exactly 0 (a `mute` head, log_decay below about -104), they read it with factor 0, and what comes
from the right in the backward pass is a multiple of gamma^1, that is, 0: such heads are not sent, zeros stand for them.
(Where no token follows, what travels is the final state, or its gradient, and nothing is mute: engine.plan.make_plan.)
Infinities and NaN are the exception: one device would spread a NaN from `0 * inf` over all later tokens, while here it
ends where a lane forgets. Results agree bit for bit as long as the states are finite.

Beside the chain, whole states move between the ranks where sequences begin and end: initial states come from the first
rank, final states go to every rank, and their gradients go the same ways back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leetdist.engine import trace
from leetdist.kernels.common import sums
from leetdist.kernels.runtime.recording import take_with

if TYPE_CHECKING:
    from leetdist.engine.lanes import Lane
    from leetdist.engine.plan import Plan


def scan(
    states: Tensor, initial: Tensor | None, keep: Tensor, plan: Plan, lane: Lane, *, reverse: bool
) -> Tensor | None:
    """Fold this rank's tile states of one lane in place, from and to its neighbours.

    states: (B, lane's heads, tiles, Dk, Dv), what each tile adds; becomes the state at each tile's start (its right end
    when reversed). initial: (rows, lane's heads, Dk, Dv) for the sequences that begin here (end here, reversed), or
    None for zeros. keep: the operator's transitions.
    Returns the states of the sequences that end here (begin here, reversed); None if nobody asked.
    """
    layout, transport, rank = plan.layout, plan.transport, plan.rank
    batch, heads, tiles, dk, dv = states.shape
    left, right = layout.continues_from_left(rank), layout.continues_to_right(rank)
    before, after = (right, left) if reverse else (left, right)
    previous, following = (rank + 1, rank - 1) if reverse else (rank - 1, rank + 1)
    what = f"the {'gradient of the ' if reverse else ''}state of {lane} ({'backward' if reverse else 'forward'} scan)"

    @contextmanager
    def received() -> Iterator[Tensor]:
        assert transport is not None
        shape = (batch, len(lane.sent), dk, dv)
        with ExitStack() as stack:
            with trace.span("receive", plan.rank, lane, states):
                if lane.sent:
                    carried = stack.enter_context(transport.receive_state(shape, states, previous, what))
                else:
                    carried = states.new_empty(shape)
            yield lane.spread(carried)

    def hand_on(final: Tensor) -> None:
        assert transport is not None
        with trace.span("send", plan.rank, lane, states):
            handed = lane.pick(_rows(final, batch, last=not reverse))
            if handed.numel():
                transport.send_state(handed, following, what)

    # The tile that takes over what arrives: full, or the sequence's last and short.
    edge = tiles - 1 if reverse else 0
    early = before and lane.forgets and tiles > 0 and plan.tiles.spans[edge][1] == plan.tiles.size
    receives, hop = before and not early, None
    to_end = plan.to_end(reverse=reverse)
    by_itself = plan.operator.folds_between and plan.tiles.num_segments == 1 and len(lane.sent) == heads
    if transport is not None and by_itself and tiles and (receives or after):
        ends = previous if receives else None, following if after else None
        hop = transport.hop((batch, heads, dk, dv), states, *ends)
    carry: AbstractContextManager[Tensor | None] = nullcontext()
    if early and initial is not None:
        carry = nullcontext(states.new_zeros(batch, heads, dk, dv))
    elif receives and hop is None:
        carry = received()
    with carry as carried:
        if carried is not None:
            rows = batch * (plan.tiles.num_segments - 1)
            if rows:
                other = states.new_zeros(rows, heads, dk, dv) if initial is None else initial
                initial = torch.cat((other, carried) if reverse else (carried, other))
            else:
                initial = carried
        with trace.span("fold", plan.rank, lane, states):
            more: dict[str, Any] = {} if hop is None else {"hop": hop}
            final = plan.operator.fold(keep, states, initial, plan.tiles, reverse=reverse, to_end=to_end, **more)
        if hop is not None and after:
            final = states.new_empty(0, heads, dk, dv)
        elif after:
            assert final is not None
            hand_on(final)
            final = _rows(final, final.shape[0] - batch, last=reverse)
    if early:
        with received() as carried:
            take_with(lambda states, carried: states[:, :, edge].copy_(carried), states, carried)
    return final


def _rows(states: Tensor, count: int, *, last: bool) -> Tensor:
    """The first or last rows; all of them as they are, because a view takes the host microseconds."""
    if count == states.shape[0]:
        return states
    return states[states.shape[0] - count :] if last else states[:count]


def states_from_first(states: Tensor | None, shape: tuple[int, ...], like: Tensor, plan: Plan) -> Tensor:
    """Each rank's rows of the initial states, which the first rank has."""
    transport, what = plan.transport, "the initial state"
    if transport is None:
        assert states is not None
        return states
    mine = plan.layout.beginning(plan.rank)
    if plan.rank == 0:
        assert states is not None
        # An exchange is through when it returns: the tensor is the caller's, who may write into it.
        transport.exchange([(states[plan.layout.beginning(rank)], rank) for rank in transport.others()], [], what)
        return states[mine]
    received = like.new_empty(mine.stop - mine.start, *shape[1:])
    transport.exchange([], [(received, 0)], what)
    return received


def states_to_first(states: Tensor, shape: tuple[int, ...], plan: Plan) -> Tensor | None:
    """All rows on the first rank, from the ranks where the sequences begin; None elsewhere."""
    transport, what = plan.transport, "the gradient of the initial state"
    if transport is None:
        return states
    if plan.rank != 0:
        transport.send(states, 0, what)
        return None
    whole = states.new_empty(shape)
    whole[plan.layout.beginning(0)] = states
    for rank in transport.others():
        transport.receive(whole[plan.layout.beginning(rank)], rank, what)
    return whole


def states_to_all(states: Tensor, shape: tuple[int, ...], plan: Plan) -> Tensor:
    """All rows on every rank, from the ranks where the sequences end."""
    transport = plan.transport
    if transport is None:
        return states
    whole = states.new_empty(shape)
    parts = [whole[plan.layout.ending(rank)] for rank in range(transport.size)]
    parts[plan.rank].copy_(states)
    transport.exchange(
        [(parts[plan.rank], rank) for rank in transport.others()],
        [(parts[rank], rank) for rank in transport.others()],
        "the final state",
    )
    transport.flush()  # the caller may write into what it gets
    return whole


def states_from_all(states: Tensor, plan: Plan) -> Tensor:
    """The rows of the sequences that end here, summed over the ranks in rank order."""
    transport, what = plan.transport, "the gradient of the final state"
    if transport is None:
        return states
    mine = states[plan.layout.ending(plan.rank)].contiguous()
    theirs = {rank: torch.empty_like(mine) for rank in transport.others()}
    transport.exchange(
        [(states[plan.layout.ending(rank)], rank) for rank in transport.others()],
        [(part, rank) for rank, part in theirs.items()],
        what,
    )
    total = torch.zeros_like(mine)
    for rank in range(transport.size):
        total += theirs.get(rank, mine)
    return total


def head_gradient_to_first(shares: Tensor, like: Tensor, name: str, plan: Plan) -> Tensor:
    """The gradient of an input a head from what each tile adds: (B, H, tiles, ...) here, (H, ...) as `like` on the
    first rank, 0 elsewhere.

    The shares of all ranks are folded in tile order, then over the batch; so the sum over ranks, in any order, is the
    single device's gradient bit for bit. Ranks hand them on as they do states, each behind its own, which takes no more
    of a host than the scans do.
    """
    transport, rank, what = plan.transport, plan.rank, f"the gradient of {name}"
    if transport is None:
        return sums.sum_of_tiles((shares,), like)
    count = sum(plan.layout.tiles(after, plan.tiles.size).count for after in range(rank + 1, transport.size))
    shape = torch.Size((*shares.shape[:2], count, *shares.shape[3:]))
    with ExitStack() as stack:
        parts: tuple[Tensor, ...] = (shares,)
        if shape.numel():
            parts += (stack.enter_context(transport.receive_state(shape, shares, rank + 1, what)),)
        if rank == 0:
            return sums.sum_of_tiles(parts, like)
        whole = sums.tiles_joined(parts)
        if whole.numel():
            transport.send_state(whole, rank - 1, what)
    return sums.sum_of_tiles((), like)
