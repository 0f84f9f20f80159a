"""From a problem to who computes what: the kernels, the tiles of this rank, and where the tokens lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from leetdist.kernels.tiles import Tiles
from leetdist.methods import Kernels, kernels_for
from leetdist.problem import Problem
from leetdist.sequence.grid import Layout

if TYPE_CHECKING:
    from leetdist.sequence.transport import Transport


@dataclass(frozen=True)
class Plan:
    """Everything that the autograd function needs beside tensors."""

    problem: Problem
    kernels: Kernels
    layout: Layout
    tiles: Tiles
    rank: int = 0
    transport: Transport | None = None
    any_initial: bool = False

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Of the initial and the final state of the whole call."""
        return self.layout.num_states, self.problem.heads, self.problem.dk, self.problem.dv


def make_plan(
    problem: Problem, layout: Layout, tile: int, transport: Transport | None = None, *, any_initial: bool
) -> Plan:
    """The plan of one rank; `layout` has its boundaries on the grid of `tile`."""
    rank = 0 if transport is None else transport.rank
    return Plan(
        problem=problem,
        kernels=kernels_for(problem, layout.offsets[-1]),
        layout=layout,
        tiles=layout.tiles(rank, tile),
        rank=rank,
        transport=transport,
        any_initial=any_initial,
    )
