"""Tiles, shards and layouts: properties that hold for any lengths."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from leetdist.kernels.common.tiles import Tiles
from leetdist.sequence.grid import LARGEST_TILE, SMALLEST_TILE, Layout, default_tile, shard_lengths

tiles = st.sampled_from([16, 32, 64])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """Documents and shards of any lengths, empty ones among them, aligned to a tile grid."""
    documents = draw(st.lists(st.integers(0, 200), min_size=1, max_size=6).filter(any))
    bounds = [0]
    for tokens in documents:
        bounds.append(bounds[-1] + tokens)
    cuts = sorted(draw(st.lists(st.integers(0, bounds[-1]), max_size=5)))
    lengths = tuple(end - begin for begin, end in pairwise([0, *cuts, bounds[-1]]))
    tile = draw(tiles)
    return Layout(1, lengths, tuple(bounds)).on_grid(tile), tile


@given(st.integers(1, 10**9))
def test_default_tile_is_a_power_of_two_in_range(tokens: int) -> None:
    tile = default_tile(tokens)
    assert SMALLEST_TILE <= tile <= LARGEST_TILE
    assert tile & (tile - 1) == 0


@given(st.integers(64, 10**6))
def test_the_default_tile_leaves_a_few_ranks_one_each(tokens: int) -> None:
    assert min(shard_lengths(tokens, 8 if tokens >= 16_384 else 4, default_tile(tokens))) > 0


def test_default_tiles_of_lengths_that_are_measured() -> None:
    lengths = (64, 128, 256, 512, 2_048, 8_192, 32_768, 100_000, 131_072, 524_288, 1_048_576)
    assert [default_tile(n) for n in lengths] == [16, 32, 64, 128, 512, 2_048, 4_096, 4_096, 4_096, 4_096, 4_096]


@given(st.integers(1, 10**6), st.integers(1, 64), tiles)
def test_shards_are_whole_tiles(tokens: int, ranks: int, tile: int) -> None:
    lengths = shard_lengths(tokens, ranks, tile)
    assert len(lengths) == ranks
    assert sum(lengths) == tokens
    ends = [sum(lengths[: rank + 1]) for rank in range(ranks)]
    assert all(end % tile == 0 or end == tokens for end in ends)
    assert max(lengths) - min(lengths) <= 2 * tile  # even, to a tile at each end


@given(layouts())
def test_every_tile_and_state_row_has_one_rank(drawn: tuple[Layout, int]) -> None:
    """The tiles of all ranks are the tiles of one device, in order; sequences begin and end on one rank each."""
    layout, tile = drawn
    ranks = range(len(layout.lengths))
    whole = Tiles(tile, layout.boundaries).spans
    sharded = [
        (layout.offsets[rank] + start, tokens) for rank in ranks for start, tokens in layout.tiles(rank, tile).spans
    ]
    assert tuple(sharded) == whole
    for owners in (layout.beginning, layout.ending):
        rows = [row for rank in ranks for row in range(layout.num_states)[owners(rank)]]
        assert rows == list(range(layout.num_states))


@given(layouts())
def test_neighbours_agree_on_what_passes_between_them(drawn: tuple[Layout, int]) -> None:
    layout, tile = drawn
    for rank in range(len(layout.lengths)):
        segments = layout.tiles(rank, tile).num_segments
        begin, end = (len(range(layout.num_states)[rows(rank)]) for rows in (layout.beginning, layout.ending))
        assert segments == begin + layout.continues_from_left(rank) == end + layout.continues_to_right(rank)
        if rank:
            assert layout.continues_from_left(rank) == layout.continues_to_right(rank - 1)


@given(layouts())
def test_aligning_twice_changes_nothing(drawn: tuple[Layout, int]) -> None:
    layout, tile = drawn
    assert layout.on_grid(tile) == layout
