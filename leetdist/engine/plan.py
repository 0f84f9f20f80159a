"""What one rank computes of a call: by which operator, on which tiles, where the tokens lie, and which heads go
together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from leetdist.engine.lanes import Lane, make_lanes
from leetdist.engine.values import Decays, forgetting_bound
from leetdist.kernels.common.memory import zero_states
from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.base import Operator
from leetdist.operators.problem import Problem, state_dtype
from leetdist.operators.registry import operator_named
from leetdist.sequence.grid import Layout
from leetdist.sequence.pipeline import best_lanes

if TYPE_CHECKING:
    from leetdist.sequence.transport import Transport


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that the two passes need beside tensors."""

    problem: Problem
    operator: Operator
    layout: Layout
    # Tiles that take over a state, or hand one on; and those of sequences that have none, mostly a tile each.
    tiles: Tiles
    alone: Tiles | None
    lanes: tuple[Lane, ...]
    rank: int = 0
    transport: Transport | None = None
    any_initial: bool = False
    # Heads that forget in one tile, and in one token (leetdist.engine.scan).
    forgetting: frozenset[int] = frozenset()
    mute: frozenset[int] = frozenset()
    # Tokens on each rank as the caller has them, before they are aligned to the grid.
    given: tuple[int, ...] = field(default=())

    @cached_property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Of the initial and the final state of the whole call."""
        return self.layout.num_states, self.problem.heads, self.problem.dk, self.problem.dv

    @property
    def linked(self) -> bool:
        """Whether any tile here takes over a state or hands one on (or there is none)."""
        return self.alone is None or self.tiles.num_segments > 0

    @cached_property
    def every_tile(self) -> Tiles:
        """Linked or alone, in the order of the row."""
        return self.tiles if self.alone is None else Tiles(self.tiles.size, self.tiles.bounds)

    @cached_property
    def learning(self) -> Plan:
        """The same where the gradient of what the operator decays by is asked for: of a compiled call that is known in
        its backward pass alone."""
        if self.problem.needs_decay_grad:
            return self
        problem = replace(self.problem, needs_decay_grad=True)
        return replace(self, problem=problem, operator=type(self.operator)(problem, self.layout.offsets[-1]))

    def zero_states(self, lane: Lane) -> Tensor:
        """(B, lane's heads, tiles that are alone, Dk, Dv), without memory: the states from which they start and end."""
        assert self.alone is not None
        problem = self.problem
        shape = problem.batch, lane.width, self.alone.count, problem.dk, problem.dv
        return zero_states(shape, state_dtype(problem.dtype), problem.device)

    @cached_property
    def repeatable(self) -> bool:
        """Whether a pass may be nothing but launches, whose host work is done once a kind of call."""
        return self.problem.device.type == "cuda" and self.operator.launches_alone

    def to_end(self, *, reverse: bool) -> bool:
        """Whether anybody reads what the last tile of the scan adds: the next rank, or who asked for the state at the
        end. (If there are several sequences here, only the last could go without; it does not.)"""
        if not self.tiles.regular:
            return True
        if reverse:
            return self.layout.continues_from_left(self.rank) or self.any_initial
        return self.layout.continues_to_right(self.rank) or self.problem.return_state

    @cached_property
    def highest(self) -> tuple[float, ...] | None:
        """The largest log-decay of each head for which the plan is right; None where it is for all, because no lane
        forgets and no head is mute. (Half a unit over the bound: exp of that is 0 too.)"""
        forget = {head for lane in self.lanes if lane.forgets for head in range(lane.total)[lane.heads]}
        if not forget and not self.mute:
            return None
        bound = forgetting_bound(self.problem.dtype) + 0.5
        return tuple(
            bound if head in self.mute else bound / self.tiles.size if head in forget else 0.0
            for head in range(self.problem.heads)
        )

    def sent_bytes(self) -> int:
        """Bytes of states that this rank sends in the forward scan."""
        if self.transport is None or not self.layout.continues_to_right(self.rank):
            return 0
        heads = sum(len(lane.sent) for lane in self.lanes)
        size = state_dtype(self.problem.dtype).itemsize
        return self.layout.batch * heads * self.problem.dk * self.problem.dv * size

    def hops(self) -> tuple[int, ...]:
        """How many hops the longest chain of each head has: as many as there are neighbours, 1 where a full tile is
        enough to forget, 0 for a mute head."""
        chain = 0 if self.transport is None else self.transport.size - 1
        return tuple(
            0 if h in self.mute else min(chain, 1) if h in self.forgetting else chain for h in range(self.problem.heads)
        )


def make_plan(
    problem: Problem,
    layout: Layout,
    tile: int,
    transport: Transport | None = None,
    *,
    decays: Decays | None = None,
    any_initial: bool,
    captured: bool = False,
    given: tuple[int, ...] = (),
) -> Plan:
    """The plan of one rank; `layout` has its boundaries on the grid of `tile`."""
    rank = 0 if transport is None else transport.rank
    operator = operator_named(problem.operator)(problem, layout.offsets[-1])
    tile = operator.part_of_tile(tile)
    tiles, alone = _linked_and_alone(layout, rank, tile, problem, operator, any_initial)
    forgetting = frozenset(() if decays is None else decays.forgetting(tile, problem.dtype))
    # Where the last ranks hold no tokens, the state at the end and its gradient cross them, multiplied by nothing.
    crossed = layout.documents is None and layout.lengths[-1] == 0
    mute = frozenset(() if decays is None or crossed else decays.forgetting(1, problem.dtype))
    lanes = 1
    if transport is not None and operator.writes_into_places:
        lanes = problem.lanes or best_lanes(
            layout.batch, problem.heads, problem.apart, problem.dk, problem.dv, layout.lengths, tile,
            problem.device.type, forgetting=len(forgetting) / problem.heads,
            captured=captured and not mute,  # their indices are copied to the GPU, which no graph may do
        )  # fmt: skip
    return Plan(
        problem=problem,
        operator=operator,
        layout=layout,
        tiles=tiles,
        alone=alone,
        lanes=make_lanes(problem.heads, problem.apart, lanes, forgetting, mute),
        rank=rank,
        transport=transport,
        any_initial=any_initial,
        forgetting=forgetting,
        mute=mute,
        given=given or layout.lengths,
    )


def _linked_and_alone(
    layout: Layout, rank: int, tile: int, problem: Problem, operator: Operator, any_initial: bool
) -> tuple[Tiles, Tiles | None]:
    """A sequence of one tile needs no states where none is given or returned: 5,000 packed documents in 131,072 tokens
    had 10 GB of them. With kernels that walk a sequence tile by tile none does."""
    tiles = layout.tiles(rank, tile)
    if any_initial or problem.return_state:
        return tiles, None
    last = tiles.num_segments - 1
    linked = {0} if layout.continues_from_left(rank) else set()
    linked |= {last} if layout.continues_to_right(rank) else set()
    rest, alone = tiles.parted(linked, several=operator.walks_rows)
    # Two kinds of tiles take two launches, of which the second writes beside what the first has written.
    if not alone.count or (rest.count and not operator.writes_into_places):
        return tiles, None
    return rest, alone
