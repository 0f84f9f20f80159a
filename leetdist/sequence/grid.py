"""Where a sequence may be cut: the tile length, and shards whose boundaries lie on the tile grid."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

from leetdist.kernels.common.tiles import Tiles, ceil_div

# Tokens of the tiles that are chosen where the caller names none (arguments.TILE_LIMIT is for those that are named).
# One is as long as it can be while tiles fill a GPU: each costs a state in memory, as much as 85 tokens of q, k and v
# (bf16, D = 128). With 32 heads, 32,768 tokens in tiles of 4,096 take 0.91 of the time in tiles of 2,048. Tiles of
# 8,192 take 0.96 of the time of eight heads x 524,288 tokens, but 1.05 to 1.1 of that of one or two heads, and 2.6
# times as long with a learnt decay, whose two passes want at most 4,096 tokens (benchmarks/notes/constant.md).
SMALLEST_TILE, LARGEST_TILE = 16, 4096
# A few ranks want a tile each; but rather four than eight that are shorter than 2,048 tokens, as each has a state that
# is moved four times: 2,048 tokens in four tiles take 0.78 of the time in eight (forward, 32 heads), 8,192 tokens 0.90
# (H100, as CUDA graphs; benchmarks/notes/short.md). Who spreads so few over more ranks can name a shorter tile.
TILES_WANTED, LEAST_TILES, TOKENS_OF_FEW = 8, 4, 2048


def default_tile(total_tokens: int) -> int:
    """The tile length (tokens, a power of two) of a sequence of `total_tokens`, when the caller names none.

    It depends on the length of the whole sequence alone, so every rank, and `shard_sequence`, knows it.
    """
    wanted = max(total_tokens // TILES_WANTED, min(total_tokens // LEAST_TILES, TOKENS_OF_FEW), SMALLEST_TILE)
    return min(1 << (wanted.bit_length() - 1), LARGEST_TILE)


def shard_lengths(total_tokens: int, ranks: int, tile: int) -> tuple[int, ...]:
    """Tokens on each rank: whole tiles, as evenly as they divide; the sequence's short last tile goes last."""
    tiles = ceil_div(total_tokens, tile)
    ends = [min(total_tokens, (rank + 1) * tiles // ranks * tile) for rank in range(ranks)]
    return tuple(end - begin for begin, end in pairwise([0, *ends]))


def even_tile(total_tokens: int, ranks: int) -> int | None:
    """The longest tile with which no rank holds a quarter more than its share; None where there is none."""
    tile = LARGEST_TILE
    while tile >= SMALLEST_TILE:
        if max(shard_lengths(total_tokens, ranks, tile)) * ranks <= 1.25 * total_tokens:
            return tile
        tile //= 2
    return None


@dataclass(frozen=True)
class Layout:
    """How the rows of the problem lie over the ranks.

    `lengths` are the tokens on each rank. `documents` are the global boundaries of packed documents (cu_seqlens), or
    None for one sequence a batch entry. States have one row a sequence: `batch` of them, or one a document.
    """

    batch: int
    lengths: tuple[int, ...]
    documents: tuple[int, ...] | None

    @property
    def offsets(self) -> tuple[int, ...]:
        """Global token at which each rank's shard begins, and the total at the end."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def ranks(self) -> int:
        return len(self.lengths)

    @property
    def num_states(self) -> int:
        return self.batch if self.documents is None else len(self.documents) - 1

    @property
    def boundaries(self) -> tuple[int, ...]:
        return self.documents or (0, self.offsets[-1])

    def on_grid(self, tile: int) -> Layout:
        """The layout with each shard boundary moved left onto the tile grid of the document it cuts."""
        starts = self.boundaries
        moved = []
        for offset in self.offsets[1:-1]:
            begin = starts[bisect_right(starts, offset) - 1] if offset < starts[-1] else offset
            moved.append(begin + (offset - begin) // tile * tile)
        offsets = [0, *moved, self.offsets[-1]]
        return Layout(self.batch, tuple(e - b for b, e in pairwise(offsets)), self.documents)

    def _cut(self, token: int) -> bool:
        """Whether a shard boundary at `token` falls inside a sequence."""
        starts = self.boundaries
        return 0 < token < starts[-1] and token not in starts

    def continues_from_left(self, rank: int) -> bool:
        if self.documents is None:
            return rank > 0
        return self._cut(self.offsets[rank])

    def continues_to_right(self, rank: int) -> bool:
        if self.documents is None:
            return rank < len(self.lengths) - 1
        return self._cut(self.offsets[rank + 1])

    def beginning(self, rank: int) -> slice:
        """State rows whose sequences begin on this rank: they need the initial state."""
        if self.documents is None:
            return slice(0, self.batch if rank == 0 else 0)
        return self._rows(rank, [self._owner(begin) for begin in self.documents[:-1]])

    def ending(self, rank: int) -> slice:
        """State rows whose sequences end on this rank: their final states appear here."""
        if self.documents is None:
            return slice(0, self.batch if rank == len(self.lengths) - 1 else 0)
        # A document without tokens ends where it begins.
        spans = pairwise(self.documents)
        return self._rows(rank, [self._owner(max(begin, end - 1)) for begin, end in spans])

    def _owner(self, token: int) -> int:
        """The rank that holds a global token; the last one for the point behind the last token."""
        return min(bisect_right(self.offsets, token) - 1, len(self.lengths) - 1)

    @staticmethod
    def _rows(rank: int, owners: list[int]) -> slice:
        return slice(bisect_left(owners, rank), bisect_right(owners, rank))

    def tiles(self, rank: int, size: int) -> Tiles:
        """The tiles of this rank's shard: one segment for each sequence that it holds a part of, or that is empty."""
        if self.documents is None:
            return Tiles(size, (0, self.lengths[rank]))
        first, last = self.offsets[rank], self.offsets[rank + 1]
        inside = [self.documents[row] - first for row in range(*self.beginning(rank).indices(self.num_states))]
        bounds = ([0] if self.continues_from_left(rank) else []) + inside
        return Tiles(size, (*bounds, last - first))
