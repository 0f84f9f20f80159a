"""Heads that travel together.

A head's numbers never meet another head's, so lanes change no bit; the hops of one overlap with the work of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from leetdist.kernels.runtime.memo import keeps


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
        return states if len(self.sent) == self.width else states[:, index_of(self.sent, states.device)]

    def spread(self, states: Tensor) -> Tensor:
        """The inverse of `pick`, with zeros for the mute heads."""
        if len(self.sent) == self.width:
            return states
        whole = states.new_zeros(states.shape[0], self.width, *states.shape[2:])
        whole[:, index_of(self.sent, states.device)] = states
        return whole


def index_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers as an index, which is copied to a GPU once: that stops the stream, and no graph may do it."""
    return (_index_of if keeps() else _index_of.__wrapped__)(numbers, device)


@lru_cache(maxsize=512)
def _index_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, and used in calls that record gradients too
        return torch.tensor(numbers, dtype=torch.int64, device=device)


def make_lanes(
    heads: int, apart: int, count: int, forgetting: frozenset[int] = frozenset(), mute: frozenset[int] = frozenset()
) -> tuple[Lane, ...]:
    """The heads in `count` lanes (at most `apart`), those that share a head of q, k or v together. Those that
    forget go first: they wait for their neighbour only, and their outputs are computed while the others' chains run
    through all ranks."""
    count = min(count, apart)
    share = heads // apart
    lanes: list[Lane] = []
    for begin, end in pairwise(lane * apart // count for lane in range(count + 1)):
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
