"""Pieces of a stream that are computed many at a time, for who can wait for their outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from leetdist.inference.staging import token_major

Piece = tuple[Tensor, ...]  # q, k, v and, of a decay a token, log_decay


class Windows:
    """Pieces on their way through `compute`, which takes them from `window` tokens on that wait.

    What is computed then ends with the last whole tile among them, if there is one: lead() tokens are up to the end of
    the tile that is open, of `tile` tokens.
    """

    def __init__(self, compute: Callable[..., Tensor], window: int, tile: int, lead: Callable[[], int]) -> None:
        self.compute, self.window, self.tile, self.lead = compute, window, tile, lead
        self.waiting: list[Piece] = []  # in order; of the first, what is not computed yet
        self.lengths: deque[int] = deque()  # of the pieces whose outputs are not given yet
        self.outputs: deque[Tensor] = deque()  # not given yet

    def map(self, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        """The outputs of each piece in turn, as soon as they are computed."""
        for piece in pieces:
            self.waiting.append(piece)
            self.lengths.append(piece[0].shape[2])
            tokens = sum(part[0].shape[2] for part in self.waiting)
            if tokens < self.window:
                continue
            whole = tokens - (tokens - self.lead()) % self.tile
            self._compute(whole if 0 < whole <= tokens else tokens)
            yield from self._given()
        if self.waiting:
            self._compute(sum(part[0].shape[2] for part in self.waiting))
            yield from self._given()

    def _compute(self, tokens: int) -> None:
        parts, rest = [], tokens
        while rest:
            piece = self.waiting.pop(0)
            count = piece[0].shape[2]
            if count > rest:
                self.waiting.insert(0, tuple(x[:, :, rest:] for x in piece))
                piece, count = tuple(x[:, :, :rest] for x in piece), rest
            parts.append(piece)
            rest -= count
        self.outputs.append(self.compute(*(joined(x) for x in zip(*parts, strict=True))))

    def _given(self) -> Iterator[Tensor]:
        there = sum(o.shape[2] for o in self.outputs)
        while self.lengths and self.lengths[0] <= there:
            length = self.lengths.popleft()
            there -= length
            parts = []
            while length:
                o = self.outputs.popleft()
                if o.shape[2] > length:
                    self.outputs.appendleft(o[:, :, length:])
                parts.append(o[:, :, :length])
                length -= parts[-1].shape[2]
            yield parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Tensors (B, H, n, ...) behind each other: without a copy where they lie so in memory, as slices of one do."""
    first, end = parts[0], parts[0].storage_offset()
    for x in parts:
        # Several storages may begin at one place, as those of NumPy's slices do: the first one must hold all.
        own, memory = x.untyped_storage(), first.untyped_storage()
        there = (own.data_ptr(), own.nbytes()) == (memory.data_ptr(), memory.nbytes()) and x.storage_offset() == end
        if not there or x.stride() != first.stride():
            break
        end += x.shape[2] * x.stride(2)
    else:
        tokens = sum(x.shape[2] for x in parts)
        return first.as_strided((*first.shape[:2], tokens, *first.shape[3:]), first.stride(), first.storage_offset())
    if first.ndim == 4 and token_major(first):
        return torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)
    return torch.cat(parts, 2)


__all__ = ["Windows", "joined"]
