"""Pieces of a stream that are computed many at a time, for who can wait for their outputs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from leetdist.inference.pieces import Piece
from leetdist.inference.state import State


class Windows:
    """Pieces on their way through `compute`, which takes them, and their tokens, from `window` tokens on that wait.

    What is computed then ends with the last whole tile among them, if there is one: lead() tokens are up to the end of
    the tile that is open, of `tile` tokens. Pieces are looked at together, as far as they can be: `check` takes those
    of a window, and returns how many tokens each has.
    """

    def __init__(
        self,
        check: Callable[[list[Piece]], list[int]],
        compute: Callable[[list[Piece], list[int]], Tensor],
        window: int,
        tile: int,
        lead: Callable[[], int],
    ) -> None:
        self.check, self.compute, self.window, self.tile, self.lead = check, compute, window, tile, lead
        self.waiting: list[Piece] = []  # in order; of the first, what is not computed yet
        self.lengths: list[int] = []  # theirs
        self.begun: list[Tensor] = []  # the outputs of what is computed of the first

    def map(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        """The outputs of each piece in turn, as soon as they are computed."""
        new: list[Piece] = []
        tokens = 0
        for piece in pieces:
            new.append(piece)
            try:
                tokens += piece[0].shape[2]
            except (AttributeError, IndexError, TypeError):
                self.check(new)  # which says what is wrong
                raise
            if tokens >= self.window:
                yield from self._outputs(new)
                new, tokens = [], sum(self.lengths)
        if new or self.waiting:
            yield from self._outputs(new, last=True)

    @torch.no_grad()
    def _outputs(self, new: list[Piece], last: bool = False) -> list[Tensor]:
        """Of the pieces that are done when no more, or no more but the whole tiles, is computed."""
        self.lengths += self.check(new)
        self.waiting += new
        ends = list(accumulate(self.lengths))
        tokens = ends[-1]
        whole = tokens if last else tokens - (tokens - self.lead()) % self.tile
        if not 0 < whole <= tokens:
            whole = tokens
        done = bisect_right(ends, whole)
        parts, lengths = self.waiting[:done], self.lengths[:done]
        self.waiting, self.lengths = self.waiting[done:], self.lengths[done:]
        begins = whole - sum(lengths)  # tokens of a piece that ends behind what is computed
        if begins:
            parts.append(tuple(x[:, :, :begins] for x in self.waiting[0]))
            lengths.append(begins)
            self.waiting[0] = tuple(x[:, :, begins:] for x in self.waiting[0])
            self.lengths[0] -= begins
        o = self.compute(parts, lengths)
        # No views to autograd, so that each is its owner's to change.
        outputs = list(torch.unsafe_split_with_sizes(o, lengths, 2))
        if self.begun:
            outputs[0] = torch.cat((*self.begun, outputs[0]), 2)
        self.begun = [outputs.pop()] if begins else []
        return outputs


def whole_tiles_apart(
    state: State, columns: Sequence[Sequence[Tensor]], lengths: Sequence[int]
) -> tuple[Tensor, State] | None:
    """The outputs of pieces that are whole tiles together, read wherever each of them lies, and the state after them;
    None where pieces or kernels are others. columns: q, k and v of the pieces."""
    tokens = sum(lengths)
    if len(columns) != 3 or state.method != "block" or tokens % state.tile:
        return None
    found = state.opened.whole_tiles(columns, lengths, state.boundary, state.log_decay, state.scale)
    if found is None:
        return None
    o, boundary = found
    return o, replace(state, boundary=boundary, tokens=state.tokens + tokens)


__all__ = ["Windows", "whole_tiles_apart"]
