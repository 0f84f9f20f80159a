"""The tile grid: which tokens are summed together, in which order.

A *tile* is the unit of the exactness contract. Tokens of one sequence are cut into tiles of `size` tokens, counted
from the sequence's own first token; the last tile of a sequence may be shorter. A tile's state is summed inside one
program in one fixed order, so it does not matter where, beside what, or on which rank a tile is computed.

This file knows tokens and tiles only; it needs neither a GPU nor a process group.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from leetdist.kernels.runtime.memo import keeps


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Tiles:
    """The tiles of one row of tokens, as one rank holds it.

    `bounds` are token offsets in the row: segment `s` is `bounds[s]:bounds[s + 1]`. A row that is one sequence (or one
    shard of it) has `bounds == (0, N)`; a row of packed documents has one segment a document, also an empty one. Every
    batch entry has the same row. Tiles are numbered through the row, segment after segment.
    """

    size: int
    bounds: tuple[int, ...]
    chosen: tuple[int, ...] | None = None  # numbers of the only segments that have tiles here; None: of all

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(first token, end) of every segment, or of the chosen ones."""
        every = tuple(pairwise(self.bounds))
        return every if self.chosen is None else tuple(every[number] for number in self.chosen)

    @cached_property
    def num_segments(self) -> int:
        return len(self.segments)

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]

    @cached_property
    def first_tile(self) -> tuple[int, ...]:
        """Number of the first tile of each segment, and one past the last tile at the end."""
        first = [0]
        for begin, end in self.segments:
            first.append(first[-1] + ceil_div(end - begin, self.size))
        return tuple(first)

    @property
    def count(self) -> int:
        return self.first_tile[-1]

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(first token, number of tokens) of every tile."""
        return tuple(
            (start, min(self.size, end - start))
            for begin, end in self.segments
            for start in range(begin, end, self.size)
        )

    def unread(self, reverse: bool, to_end: bool) -> int:
        """Number of the tile whose share of the state may be missing: none (-1), or the one that a walk ends with."""
        assert to_end or self.regular  # or each segment would have one
        return -1 if to_end or not self.count else 0 if reverse else self.count - 1

    @property
    def regular(self) -> bool:
        """One segment: tile `j` starts at token `j * size`, and a kernel needs no table."""
        return self.chosen is None and self.num_segments == 1

    def finer(self, size: int) -> tuple[Tiles, Tiles]:
        """Tiles of `size` tokens, of which this grid's are whole multiples, and the same with each of this grid's tiles
        a segment of its own."""
        cuts = {start: start + count for start, count in self.spans}
        if self.chosen is None:
            return Tiles(size, self.bounds), Tiles(size, (*cuts, self.num_tokens))
        bounds = tuple(sorted({0, *cuts, *cuts.values(), self.num_tokens}))
        own = Tiles(size, bounds, tuple(number for number, start in enumerate(bounds[:-1]) if start in cuts))
        return Tiles(size, self.bounds, self.chosen), own

    def parted(self, linked: Collection[int], *, several: bool = False) -> tuple[Tiles, Tiles]:
        """The segments of several tiles, and those that are `linked` to what is elsewhere; and those that are one tile,
        or also those of `several`, by themselves. (Of a row that is one such segment, none and the row.)"""
        alone = {
            number
            for number, (begin, end) in enumerate(self.segments)
            if begin < end and (several or end <= begin + self.size) and number not in linked
        }
        if self.regular and alone:
            return Tiles(self.size, self.bounds, ()), self
        rest = tuple(number for number in range(self.num_segments) if number not in alone)
        return Tiles(self.size, self.bounds, rest), Tiles(self.size, self.bounds, tuple(sorted(alone)))

    def up_to(self, tokens: int) -> tuple[Tiles, Tiles]:
        """The segments of at most so many tokens, and the rest."""
        found = self._apart.get(tokens)
        if found is None:
            numbers = range(len(self.bounds) - 1) if self.chosen is None else self.chosen
            short = tuple(n for n in numbers if self.bounds[n + 1] - self.bounds[n] <= tokens)
            rest = tuple(n for n in numbers if self.bounds[n + 1] - self.bounds[n] > tokens)
            chosen = (self if own == tuple(numbers) else Tiles(self.size, self.bounds, own) for own in (short, rest))
            found = self._apart[tokens] = next(chosen), next(chosen)
        return found

    @cached_property
    def whole(self) -> Tiles:
        """The same segments, each of them one tile."""
        return Tiles(max((end - begin for begin, end in self.segments), default=0) or 1, self.bounds, self.chosen)

    @cached_property
    def _apart(self) -> dict[int, tuple[Tiles, Tiles]]:
        return {}

    # Who launches with the address of a table keeps this object, and it keeps the table.
    @cached_property
    def _tables(self) -> dict[tuple[str, torch.device], torch.Tensor]:
        return {}

    def table(self, device: torch.device) -> torch.Tensor:
        """(count, 2) int64 on `device`: first token and number of tokens of every tile."""
        if not keeps():
            return _table.__wrapped__(self, device)
        return self._tables.setdefault(("tiles", device), _table(self, device))

    def needed_table(self, device: torch.device) -> torch.Tensor | None:
        """`table`; None where tiles are `regular`, and a kernel needs none."""
        return None if self.regular else self.table(device)

    def segment_table(self, device: torch.device) -> torch.Tensor:
        """(num_segments + 1,) int64 on `device`: `first_tile`."""
        if not keeps():
            return _segment_table.__wrapped__(self, device)
        return self._tables.setdefault(("segments", device), _segment_table(self, device))


# Copying a table to the GPU synchronises with the host (and cannot be captured), so the last few are kept.
@lru_cache(maxsize=256)
def _table(tiles: Tiles, device: torch.device) -> torch.Tensor:
    return torch.tensor(tiles.spans, dtype=torch.int64, device="cpu").reshape(-1, 2).to(device)


@lru_cache(maxsize=256)
def _segment_table(tiles: Tiles, device: torch.device) -> torch.Tensor:
    return torch.tensor(tiles.first_tile, dtype=torch.int64, device="cpu").to(device)
