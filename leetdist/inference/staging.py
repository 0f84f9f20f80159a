"""Pieces in host memory through a computation on a GPU: copies in, compute and copies out at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from leetdist.inference.pieces import Piece, token_major


class Staging:
    """Cuts pieces into windows and keeps two of them on the device, one computed while the next one travels.

    Device memory is that of two windows, whatever the length of a piece. Copies overlap where host memory is pinned;
    from pageable memory they only overlap with compute, at a lower rate.
    """

    def __init__(self, device: torch.device, window: int) -> None:
        self.device, self.window = device, window
        self.incoming, self.outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.sent: deque[torch.cuda.Event] = deque()

    @torch.no_grad()  # of a generator: not while its caller has an output
    def map(self, compute: Callable[..., Tensor], pieces: Iterable[Piece], lead: Callable[[], int]) -> Iterator[Tensor]:
        """compute's output of each piece, in pinned host memory, one piece late: the next one is under way by then.

        `lead()` tokens come before the first whole window of a piece, so that windows lie on the tile grid.
        """
        waiting: tuple[Tensor, torch.cuda.Event] | None = None
        for piece in pieces:
            under_way = self._enqueue(compute, piece, lead())
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = under_way
        if waiting is not None:
            yield self._arrived(*waiting)

    @staticmethod
    def _arrived(out: Tensor, sent: torch.cuda.Event) -> Tensor:
        sent.synchronize()
        return out

    def _enqueue(self, compute: Callable[..., Tensor], piece: Piece, lead: int) -> tuple[Tensor, torch.cuda.Event]:
        q, _, v = piece[:3]
        if not q.shape[2]:
            raise ValueError("q: N is 0; a piece needs at least one token")
        heads = max(x.shape[1] for x in piece)
        out = _empty_like((q.shape[0], heads, q.shape[2], v.shape[3]), q, device="cpu", pin_memory=True)
        current = torch.cuda.current_stream(self.device)
        ends = [lead, *range(lead + self.window, q.shape[2], self.window), q.shape[2]]
        begin = 0
        for end in ends:
            if begin >= end:
                continue
            if len(self.sent) == 2:  # the host must not run ahead: what it enqueues takes memory
                self.sent.popleft().synchronize()
            with torch.cuda.stream(self.incoming):
                window = [self._to_device(x[:, :, begin:end]) for x in piece]
                loaded = self.incoming.record_event()
            current.wait_event(loaded)
            for x in window:
                x.record_stream(current)
            with torch.cuda.stream(current):
                o = compute(*window)
            self.outgoing.wait_event(current.record_event())
            with torch.cuda.stream(self.outgoing):
                _copy(out[:, :, begin:end], o)
                self.sent.append(self.outgoing.record_event())
            o.record_stream(self.outgoing)
            begin = end
        loaded.synchronize()  # from here on the caller may overwrite the piece
        return out, self.sent[-1]

    def _to_device(self, x: Tensor) -> Tensor:
        on_device = _empty_like(tuple(x.shape), x, device=self.device)
        _copy(on_device, x)
        return on_device


def _empty_like(shape: tuple[int, ...], like: Tensor, **options: object) -> Tensor:
    """An empty (B, H, N, ...) tensor with its dimensions in memory as `like` has them."""
    if not token_major(like):
        return torch.empty(shape, dtype=like.dtype, **options)  # type: ignore[call-overload]
    batch, heads, tokens, *rest = shape
    return torch.empty(batch, tokens, heads, *rest, dtype=like.dtype, **options).transpose(1, 2)  # type: ignore[call-overload]


def _copy(to: Tensor, source: Tensor) -> None:
    """Block by block: a copy of a window that is no single block would pass through pageable memory, and wait."""
    for to_row, row in zip(to, source, strict=True):
        if token_major(source):
            to_row.copy_(row, non_blocking=True)
        else:
            for to_head, head in zip(to_row, row, strict=True):
                to_head.copy_(head, non_blocking=True)


__all__ = ["Staging"]
