"""The fold over tiles in Triton: from left to right, however many tiles are read together."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.constant_decay.pytorch import block as exact
from leetdist.kernels.token_decay.pytorch import block as exact_by_token
from leetdist.reference import relative_error

fold = pytest.importorskip("leetdist.kernels.constant_decay.triton.fold").fold


@pytest.mark.interpreter
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_a_fold_in_pieces_has_the_bits_of_one(by_token: bool, reverse: bool) -> None:
    tokens, size, heads = 16 * 37 - 5, 16, 2
    states, initial = torch.randn(1, heads, 37, 24, 40), torch.randn(1, heads, 24, 40)
    keep = torch.rand(1, heads, 37) if by_token else torch.tensor([-0.01, 0.0])

    def folded(begin: int, end: int, start: Tensor) -> tuple[Tensor, Tensor]:
        own = states[:, :, begin:end].clone(memory_format=torch.contiguous_format)
        factors = keep[..., begin:end].contiguous() if by_token else keep
        tiles = Tiles(size, (0, min(size * end, tokens) - size * begin))
        final = fold(own, start, factors, tiles, reverse=reverse)
        assert final is not None
        return own, final

    whole, final = folded(0, 37, initial)
    for cut in (3, 20):
        parts = [(0, cut), (cut, 37)]
        start, found = initial, []
        for part in reversed(parts) if reverse else parts:
            own, start = folded(*part, start)
            found.append(own)
        assert torch.equal(start, final)
        assert torch.equal(torch.cat(found[::-1] if reverse else found, 2), whole)
    expected, tiles = states.double(), Tiles(size, (0, tokens))
    of = exact_by_token if by_token else exact
    end = of.fold(expected, initial.double(), keep.double() if by_token else keep, tiles, reverse=reverse)
    assert relative_error(whole, expected) < 1e-6
    assert relative_error(final, end) < 1e-6


@pytest.mark.interpreter
@pytest.mark.parametrize("bounds", [(0, 600, 600, 633, 1000), (0, 1000), (0, 100)])
def test_tiles_that_nobody_reads(bounds: tuple[int, ...]) -> None:
    """Documents of many tiles and of none; of one sequence, the last tile may be no numbers."""
    tiles, log_decay = Tiles(16, bounds), torch.tensor([-0.02, -1.0])
    to_end = not tiles.regular
    states = torch.randn(1, 2, tiles.count, 16, 24)
    expected = states.double()
    exact.fold(expected, None, log_decay, tiles, reverse=False, to_end=to_end)
    if not to_end:
        states[:, :, -1] = torch.nan
    final = fold(states, None, log_decay, tiles, reverse=False, to_end=to_end)
    assert (final is None) == (not to_end)
    assert relative_error(states, expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_folds_that_take_and_hand_on_by_themselves(by_token: bool, reverse: bool) -> None:
    """Ranks of some tiles each, in one process: the bits of one fold, twice, and all flags ready for another."""
    from leetdist.kernels.common import hop
    from leetdist.sequence.inboxes import Box

    device, size, heads, shape = "cuda" if torch.cuda.is_available() else "cpu", 16, 2, (1, 2, 32, 64)
    cuts = (0, 3, 20, 37)
    memory = torch.zeros(3, Box.words(2 * 32 * 64, hop.PIECES), dtype=torch.int32, device=device)
    boxes = [Box(own, hop.PIECES) for own in memory]
    for box in boxes:
        box.free[0][1].fill_(1)

    def way(of: int, at: int, *ranks: int) -> hop.Way:
        slot = boxes[at].message(0, 1, shape, torch.float32)
        return hop.Way(slot, boxes[at].full[0][1], boxes[of].free[0][1], (ranks[0], ranks[1]), seconds=1.0)

    for _ in range(2):
        whole, first = torch.randn(1, heads, 37, 32, 64, device=device), torch.randn(1, heads, 32, 64, device=device)
        keep = torch.rand(1, heads, 37, device=device) if by_token else torch.tensor([-0.01, 0.0], device=device)
        ranks = [whole[:, :, begin:end].contiguous() for begin, end in pairwise(cuts)]
        expected = fold(whole, first, keep, Tiles(size, (0, size * 37)), reverse=reverse)
        order = (2, 1, 0) if reverse else (0, 1, 2)
        for place, rank in enumerate(order):
            before = way(order[place - 1], rank, rank, order[place - 1]) if place else None
            after = way(rank, order[place + 1], rank, order[place + 1]) if place < 2 else None
            begin, end = cuts[rank : rank + 2]
            final = fold(
                ranks[rank], None if place else first, keep[..., begin:end].contiguous() if by_token else keep,
                Tiles(size, (0, size * (end - begin))), reverse=reverse, hop=hop.Hop(before, after),
            )  # fmt: skip
            assert (final is None) == (place < 2)
        assert torch.equal(torch.cat(ranks, 2), whole)
        assert torch.equal(final, expected)
        assert [int(box.full[0][1].sum()) for box in boxes] == [0, 0, 0]
        assert [int(box.free[0][1].sum()) for box in boxes] == [hop.PIECES] * 3
