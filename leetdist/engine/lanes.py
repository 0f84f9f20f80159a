"""Heads that travel together, and tensors that are filled lane by lane.

A head's numbers never meet another head's, so lanes change no bit; the hops of one overlap with the work of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leetdist.engine.layout import empty_as, sum_shared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from leetdist.engine.plan import Plan


@dataclass(frozen=True, eq=False)
class Lane:
    """Heads whose states travel together, `heads` of the `total`. See leetdist.engine.scan on what `forgets` (of the
    whole lane) and mute heads are; `sent` are the others, counted from the lane's first."""

    number: int
    heads: slice
    total: int
    sent: tuple[int, ...]
    forgets: bool = False

    def __str__(self) -> str:
        return f"heads {self.heads.start} to {self.heads.stop - 1}"

    @property
    def width(self) -> int:
        return int(self.heads.stop - self.heads.start)

    def of(self, count: int) -> slice:
        """The lane's heads of a tensor with `count` of them, each shared by as many of the lane's."""
        share = self.total // count
        return slice(self.heads.start // share, self.heads.stop // share)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """x's heads of this lane; x itself where they are all, because a view takes a few microseconds too."""
        own = self.of(x.shape[dim])
        return x if own.stop - own.start == x.shape[dim] else x.narrow(dim, own.start, own.stop - own.start)

    def pick(self, states: Tensor) -> Tensor:
        """(rows, width, Dk, Dv) without the mute heads."""
        return states if len(self.sent) == self.width else states[:, _index(self.sent, states.device)]

    def spread(self, states: Tensor) -> Tensor:
        """The inverse of `pick`, with zeros for the mute heads."""
        if len(self.sent) == self.width:
            return states
        whole = states.new_zeros(states.shape[0], self.width, *states.shape[2:])
        whole[:, _index(self.sent, states.device)] = states
        return whole


@cache
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, and used in calls that record gradients too
        return torch.tensor(heads, dtype=torch.int64, device=device)


def make_lanes(
    heads: int, kv_heads: int, count: int, forgetting: frozenset[int] = frozenset(), mute: frozenset[int] = frozenset()
) -> tuple[Lane, ...]:
    """The heads in `count` lanes, those that share a head of k and v together. Those that forget go first: they
    wait for their neighbour only, and their outputs are computed while the others' chains run through all ranks."""
    count = min(count, kv_heads)
    share = heads // kv_heads
    lanes: list[Lane] = []
    for begin, end in pairwise(lane * kv_heads // count for lane in range(count + 1)):
        own = range(begin * share, end * share)
        lanes.append(
            Lane(
                number=len(lanes),
                heads=slice(own.start, own.stop),
                total=heads,
                sent=tuple(head - own.start for head in own if head not in mute),
                forgets=forgetting.issuperset(own),
            )
        )
    return tuple(sorted(lanes, key=lambda lane: not lane.forgets))


class LaneStates:
    """(B, lane's heads, tiles, Dk, Dv) of every lane, one lane after the other in `flat`."""

    def __init__(self, x: Tensor, plan: Plan, flat: Tensor | None = None) -> None:
        self.like = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        problem = plan.problem
        self.one = len(plan.lanes) == 1
        self.shape = (x.shape[0], problem.heads, plan.tiles.count, problem.dk, problem.dv)
        self.parts: dict[Lane, Tensor] = {}
        if flat is None and not self.one:
            batch, heads, tiles, dk, dv = self.shape
            flat = self.like.new_empty(batch * heads * tiles * dk * dv)
        if flat is not None:
            self._set(flat, plan)

    def _set(self, flat: Tensor, plan: Plan) -> None:
        batch, heads, *rest = self.shape
        self.flat = flat
        parts = flat.split([flat.numel() // heads * lane.width for lane in plan.lanes])
        self.parts = {lane: part.view(batch, lane.width, *rest) for lane, part in zip(plan.lanes, parts, strict=True)}

    def __getitem__(self, lane: Lane) -> Tensor:
        return self.parts[lane]

    def place(self, lane: Lane) -> Tensor | None:
        """Where a kernel is to write the lane's states; None leaves it to the kernel."""
        return None if self.one else self.parts[lane]

    def put(self, lane: Lane, states: Tensor) -> None:
        """What the kernel returned, in its place or in one of its own."""
        if self.one:
            self.parts = {lane: states}
            self.flat = states.flatten()


class LaneTokens:
    """(B, heads, N, dim) in x's dtype and layout (x's own heads and dim unless told), filled lane by lane. What is
    computed for more heads is summed over those that share one, in `wide`, the dtype that a kernel is to give."""

    def __init__(
        self, x: Tensor, wide: torch.dtype, plan: Plan, *, heads: int | None = None, dim: int | None = None
    ) -> None:
        self.one = len(plan.lanes) == 1
        self.heads, self.dtype = heads or x.shape[1], x.dtype
        self.shared = self.heads < plan.problem.heads
        self.wide = wide if self.shared else x.dtype
        if not self.one:
            self.whole = empty_as(x, self.heads, dim or x.shape[3], x.dtype) if x.ndim == 4 else x.new_empty(x.shape)

    def place(self, lane: Lane) -> Tensor | None:
        """Where a kernel is to write the lane's part; None leaves it to the kernel."""
        return None if self.one or self.shared else self.whole[:, lane.of(self.heads)]

    def put(self, lane: Lane, part: Tensor) -> None:
        own = lane.of(self.heads)
        if self.shared:
            part = sum_shared(part, own.stop - own.start).to(self.dtype)
        if self.one:
            self.whole = part
        elif self.shared:
            self.whole[:, own] = part


def in_order(lanes: Mapping[Lane, Tensor], plan: Plan) -> Tensor:
    """The lanes' parts along dimension 1, in the order of the heads."""
    if len(lanes) == 1:
        return lanes[plan.lanes[0]]
    return torch.cat([lanes[lane] for lane in sorted(plan.lanes, key=lambda lane: lane.heads.start)], 1)
