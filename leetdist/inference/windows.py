"""Pieces of a stream that are computed many at a time, for who can wait for their outputs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import attrgetter

import torch
from torch import Tensor

from leetdist.inference.staging import token_major
from leetdist.inference.state import State

Piece = tuple[Tensor, ...]  # q, k, v and, of a decay a token, log_decay


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


def lengths_if_alike(pieces: list[Piece]) -> list[int] | None:
    """Tokens of each piece, where nothing else of a piece, as far as checks look at it, is not as in the first; None
    where they have to look at each."""
    try:
        columns = list(zip(*pieces, strict=True))
    except (TypeError, ValueError):
        return None
    found: list[int] | None = None
    for column in columns:
        if set(map(type, column)) != {Tensor} or len(set(map(_FACTS, column))) > 1:
            return None
        shapes = list(map(_SHAPE, column))
        first = shapes[0]
        if len(first) < 3:
            return None
        if shapes.count(first) == len(shapes):
            lengths = [first[2]] * len(shapes)
        elif all((*shape[:2], *shape[3:]) == (*first[:2], *first[3:]) for shape in shapes):
            lengths = [shape[2] for shape in shapes]
        else:
            return None
        if found not in (None, lengths):
            return None
        found = lengths
    return found


_SHAPE = attrgetter("shape")
_FACTS = attrgetter("dtype", "device", "layout", "is_nested")


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


def copied(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, H, n, ...) behind each other."""
    if parts[0].ndim == 4 and token_major(parts[0]):
        return torch.cat(_dense([x.transpose(1, 2) for x in parts]), 1).transpose(1, 2)
    return torch.cat(_dense(list(parts)), 2)


def as_one(parts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor | None:
    """Tensors (B, H, n, ...) of so many tokens that lie behind each other in memory, as slices of one do; else None."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tokens, strides = sum(lengths), list(map(Tensor.stride, parts))
    if strides.count(strides[0]) == len(strides) and not any(map(Tensor.is_neg, parts)):
        step, begin = first.stride(2) * first.element_size(), first.data_ptr()
        begins = [begin + step * place for place in accumulate(lengths[:-1], initial=0)]
        shape, memory = (*first.shape[:2], tokens, *first.shape[3:]), first.untyped_storage()
        extent = 1 + sum((size - 1) * by for size, by in zip(shape, first.stride(), strict=True))
        # All of it must be in the first one's memory: NumPy's slices come with no more of it than they have themselves.
        inside = begin + extent * first.element_size() <= memory.data_ptr() + memory.nbytes()
        if inside and list(map(Tensor.data_ptr, parts)) == begins:
            return first.as_strided(shape, first.stride(), first.storage_offset())
    return None


def _dense(parts: list[Tensor]) -> list[Tensor]:
    """The same, without slices at either end among dense tensors: one such slice, and all are copied number by number
    (43 us a piece of 1,000 tokens of 32 heads of 128 where it is 13)."""
    dense = list(map(Tensor.is_contiguous, parts))
    return [x.contiguous() for x in parts] if len(parts) - 2 <= sum(dense) < len(parts) else parts


__all__ = ["Windows", "as_one", "copied", "lengths_if_alike", "whole_tiles_apart"]
