"""Tensors that are filled lane by lane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from leetdist.engine.lanes import Lane
from leetdist.engine.layout import empty_as
from leetdist.engine.plan import Plan
from leetdist.kernels.common.sums import sum_shared
from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.problem import state_dtype


class LaneStates:
    """(B, lane's heads, tiles, Dk, Dv) of every lane, one lane after the other in `flat`; None where there are none."""

    def __init__(self, x: Tensor, plan: Plan, flat: Tensor | None = None) -> None:
        self.like = x.new_empty(0, dtype=state_dtype(x.dtype))
        problem = plan.problem
        self.one = len(plan.lanes) == 1
        self.shape = (x.shape[0], problem.heads, plan.tiles.count, problem.dk, problem.dv)
        self.parts: dict[Lane, Tensor] = {}
        self.flat: Tensor | None = None
        if not plan.linked:
            return
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
            part = sum_shared(part, own.stop - own.start, self.dtype)
        if self.one:
            self.whole = part
        elif self.shared:
            self.whole[:, own] = part


def kinds_of_tiles(plan: Plan, lane: Lane, *states: LaneStates) -> Iterator[tuple[Tiles, list[Tensor]]]:
    """The tiles that have states, with the lane's, and those of sequences that are alone, with zeros. What is computed
    of the second goes where that of the first is."""
    if plan.linked:
        yield plan.tiles, [x[lane] for x in states]
    if plan.alone is not None:
        yield plan.alone, [plan.zero_states(lane)] * len(states)


def in_order(lanes: Mapping[Lane, Tensor], plan: Plan) -> Tensor:
    """The lanes' parts along dimension 1, in the order of the heads."""
    if len(lanes) == 1:
        return lanes[plan.lanes[0]]
    return torch.cat([lanes[lane] for lane in sorted(plan.lanes, key=lambda lane: lane.heads.start)], 1)
