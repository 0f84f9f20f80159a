"""The scan over ranks: the left fold over all tiles of a sequence, in the one order that the contract fixes.

A rank folds its own tiles onto the state that arrives from the rank before it (in the direction of the walk) and hands
the result on. `S_p = gamma^L S_{p-1} + S_local` would need no fold per hop, but associates the sum differently, and so
gives other bits than one device. What travels is one state a sequence: (B, H, Dk, Dv) fp32, whatever the length.

Beside the chain, whole states move between the ranks where sequences begin and end: initial states come from the first
rank, final states go to every rank, and their gradients go the same ways back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from leetdist.plan import Plan


def scan(states: Tensor, initial: Tensor | None, log_decay: Tensor, plan: Plan, *, reverse: bool) -> Tensor:
    """Fold this rank's tile states in place, from and to its neighbours.

    states: (B, H, tiles, Dk, Dv), what each tile adds; becomes the state at each tile's start (its right end when
    reversed). initial: (rows, H, Dk, Dv) for the sequences that begin here (end here, reversed), or None for zeros.
    Returns the states of the sequences that end here (begin here, reversed).
    """
    layout, transport, rank = plan.layout, plan.transport, plan.rank
    batch, heads, _, dk, dv = states.shape
    left, right = layout.continues_from_left(rank), layout.continues_to_right(rank)
    before, after = (right, left) if reverse else (left, right)
    previous, following = (rank + 1, rank - 1) if reverse else (rank - 1, rank + 1)
    direction = "gradient of the state" if reverse else "state"

    if before:
        assert transport is not None
        carried = transport.receive(states.new_empty(batch, heads, dk, dv), previous, f"the {direction}")
        if initial is None:
            rows = states.shape[0] * plan.tiles.num_segments - batch
            initial = states.new_zeros(rows, heads, dk, dv)
        initial = torch.cat((initial, carried) if reverse else (carried, initial))
    final = plan.kernels.fold(states, initial, log_decay, plan.tiles, reverse=reverse)
    if after:
        assert transport is not None
        handed = final[:batch] if reverse else final[final.shape[0] - batch :]
        transport.send(handed, following, f"the {direction}")
        final = final[batch:] if reverse else final[: final.shape[0] - batch]
    return final


def states_from_first(states: Tensor | None, shape: tuple[int, ...], like: Tensor, plan: Plan) -> Tensor:
    """Each rank's rows of the initial states, which the first rank has."""
    transport, what = plan.transport, "the initial state"
    if transport is None:
        assert states is not None
        return states
    mine = plan.layout.beginning(plan.rank)
    if plan.rank == 0:
        assert states is not None
        for rank in transport.others():
            transport.send(states[plan.layout.beginning(rank)], rank, what)
        return states[mine]
    return transport.receive(like.new_empty(mine.stop - mine.start, *shape[1:]), 0, what)


def states_to_first(states: Tensor, shape: tuple[int, ...], plan: Plan) -> Tensor | None:
    """All rows on the first rank, from the ranks where the sequences begin; None elsewhere."""
    transport, what = plan.transport, "the gradient of the initial state"
    if transport is None:
        return states
    if plan.rank != 0:
        transport.send(states, 0, what)
        return None
    whole = states.new_empty(shape)
    for rank in range(transport.size):
        rows = whole[plan.layout.beginning(rank)]
        rows.copy_(states if rank == 0 else transport.receive(torch.empty_like(rows), rank, what))
    return whole


def states_to_all(states: Tensor, shape: tuple[int, ...], plan: Plan) -> Tensor:
    """All rows on every rank, from the ranks where the sequences end."""
    transport = plan.transport
    if transport is None:
        return states
    whole = states.new_empty(shape)
    for rank in range(transport.size):
        rows = whole[plan.layout.ending(rank)]
        if rows.numel():
            mine = states if rank == plan.rank else torch.empty_like(rows)
            rows.copy_(transport.broadcast(mine, rank, "the final state"))
    return whole


def states_from_all(states: Tensor, plan: Plan) -> Tensor:
    """The rows of the sequences that end here, summed over the ranks in rank order."""
    transport, what = plan.transport, "the gradient of the final state"
    if transport is None:
        return states
    for rank in transport.others():
        transport.send(states[plan.layout.ending(rank)], rank, what)
    mine = states[plan.layout.ending(plan.rank)]
    total = torch.zeros_like(mine)
    for rank in range(transport.size):
        total += mine if rank == plan.rank else transport.receive(torch.empty_like(mine), rank, what)
    return total


def decay_gradient_to_first(shares: Tensor, log_decay: Tensor, plan: Plan) -> Tensor:
    """The gradient of log_decay from what each tile adds: (B, H, tiles) here, (H,) on the first rank, 0 elsewhere.

    The shares of all ranks are folded in tile order, then over the batch; so the sum over ranks, in any order, is the
    single device's gradient bit for bit.
    """
    transport, what = plan.transport, "the gradient of log_decay"
    if transport is not None:
        if plan.rank != 0:
            transport.send(shares, 0, what)
            return torch.zeros_like(log_decay)
        parts = [shares]
        for rank in transport.others():
            count = plan.layout.tiles(rank, plan.tiles.size).count
            parts.append(transport.receive(shares.new_empty(*shares.shape[:2], count), rank, what))
        shares = torch.cat(parts, 2)
    # cumsum, because a sum's order may depend on the number of threads, which launchers set.
    in_order = shares.transpose(0, 1).flatten(1).double()
    return in_order.cumsum(1)[:, -1].to(log_decay.dtype)
